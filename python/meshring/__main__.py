"""`python -m meshring`: the same as the command `meshring`."""

from meshring.cli import main

if __name__ == "__main__":
    main(prog_name="meshring")
