"""Pipeline x data x tensor parallel training of one model on 8 ranks, checked against one process.

meshring run -n 8 examples/pipeline_mesh.py --schedule zb-h1
"""

import argparse

import numpy as np

import meshring as mr

PIPE, DATA, TENSOR = 2, 2, 2  # the mesh: rank = (pp * DATA + dp) * TENSOR + tp
WIDTH, HIDDEN, BLOCKS, ROWS, RATE = 8, 16, 4, 24, 0.05


class Block:
    """x + tanh(x a) b, where each tensor-parallel rank has some columns of a and rows of b."""

    def __init__(self, number, tensor):
        random = np.random.default_rng(number)
        a = random.standard_normal((WIDTH, HIDDEN)) / WIDTH**0.5
        b = random.standard_normal((HIDDEN, WIDTH)) / HIDDEN**0.5
        rank, size = (0, 1) if tensor is None else (tensor.rank, tensor.size)
        mine = np.array_split(np.arange(HIDDEN), size)[rank]
        self.tensor, self.parameters = tensor, [a[:, mine].copy(), b[mine].copy()]
        self.gradients = [np.zeros_like(p) for p in self.parameters]

    def sum(self, x):
        """The sum over the tensor-parallel ranks."""
        return x if self.tensor is None else self.tensor.all_reduce(x)

    def forward(self, x):
        a, b = self.parameters
        h = np.tanh(x @ a)
        return x + self.sum(h @ b), (x, h)

    def backward_input(self, saved, gy):
        (x, h), (a, b) = saved, self.parameters
        gh = (gy @ b.T) * (1 - h * h)
        return gy + self.sum(gh @ a.T), (x, h, gh, gy)

    def backward_weight(self, rest):
        x, h, gh, gy = rest
        self.gradients[0] += x.T @ gh
        self.gradients[1] += h.T @ gy


class Stage:
    """Some consecutive blocks, as a meshring.PipelineStage."""

    def __init__(self, numbers, tensor=None):
        self.blocks = [Block(int(number), tensor) for number in numbers]

    def forward(self, x):
        saved = []
        for block in self.blocks:
            x, kept = block.forward(x)
            saved.append(kept)
        return x, saved

    def backward_input(self, saved, gy):
        rest = []
        for block, kept in zip(reversed(self.blocks), reversed(saved), strict=True):
            gy, left = block.backward_input(kept, gy)
            rest.append((block, left))
        return gy, rest

    def backward_weight(self, rest):
        for block, left in rest:
            block.backward_weight(left)

    def gradients(self):
        return [gradient for block in self.blocks for gradient in block.gradients]

    def step(self):
        """Descend along the gradients and clear them."""
        for block in self.blocks:
            for parameter, gradient in zip(block.parameters, block.gradients, strict=True):
                parameter -= RATE * gradient
                gradient[...] = 0


def loss(y, target):
    """The squared error, as a part of the mean over all rows of a step."""
    return float(((y - target) ** 2).sum()) / ROWS, 2 * (y - target) / ROWS


def batch(step):
    random = np.random.default_rng(1000 + step)
    x = random.standard_normal((ROWS, WIDTH))
    return x, np.sin(x[:, ::-1])


def one_process(steps):
    """The losses of the same training without a mesh."""
    stage, losses = Stage(range(BLOCKS)), []
    for step in range(steps):
        x, target = batch(step)
        y, saved = stage.forward(x)
        value, gradient = loss(y, target)
        stage.backward_weight(stage.backward_input(saved, gradient)[1])
        stage.step()
        losses.append(value)
    return losses


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--checkpoint", action="store_true", help="recompute forwards")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    comm = mr.init()
    if comm.size != PIPE * DATA * TENSOR:
        raise SystemExit(f"this example needs {PIPE * DATA * TENSOR} ranks: meshring run -n 8 ...")
    pp, dp = comm.rank // (DATA * TENSOR), comm.rank // TENSOR % DATA
    tp = comm.rank % TENSOR
    pipe = comm.split(dp * TENSOR + tp)  # the ranks that differ in pp only
    peers = comm.split(pp * TENSOR + tp)  # in dp only
    tensor = comm.split(pp * DATA + dp)  # in tp only

    def make_stage(number, count):
        return Stage(np.array_split(np.arange(BLOCKS), count)[number], tensor)

    losses = []
    with mr.build_pipeline(
        make_stage,
        args.microbatches,
        args.schedule,
        comm=pipe,
        depth=PIPE,
        loss=loss,
        gradient_checkpointing=args.checkpoint,
        data_parallel=peers,
        reduce_op="sum",
    ) as pipeline:
        mine = slice(dp * ROWS // DATA, (dp + 1) * ROWS // DATA)
        for step in range(args.steps):
            x, target = batch(step)
            result = pipeline.run(x[mine], target[mine])
            for stage in pipeline.stages.values():
                stage.step()
            part = 0.0 if result.loss is None or tp else result.loss
            losses.append(float(comm.all_reduce(np.array([part]))[0]))
    if comm.rank == 0:
        expected = one_process(args.steps)
        worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        print(f"{pipeline.schedule}, {DATA} data-parallel, {TENSOR} tensor-parallel")
        print(f"loss {losses[0]:.6f} -> {losses[-1]:.6f} in {args.steps} steps")
        print(f"differs from one process by at most {worst:.1e}")
        if worst > 1e-6:
            raise SystemExit("the losses differ")
    for part in (pipe, peers, tensor, comm):
        part.close()


if __name__ == "__main__":
    main()
