"""Trains an MLP on scikit-learn's digits, its layers over all ranks, with any schedule.

meshring run -n 4 examples/pipeline_digits.py --schedule zb-v --checkpoint --svg run.svg
"""

import argparse

import numpy as np

import meshring as mr

WIDTH, LAYERS, CLASSES, RATE = 64, 16, 10, 0.1


class Layer:
    """A residual layer, x + tanh(x w + b) / 2, and its gradients."""

    def __init__(self, number):
        random = np.random.default_rng(number)
        self.w = random.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5
        self.b = np.zeros(WIDTH)
        self.parameters = [self.w, self.b]
        self.gradients = [np.zeros_like(self.w), np.zeros_like(self.b)]

    def forward(self, x):
        h = np.tanh(x @ self.w + self.b)
        return x + h / 2, (x, h)

    def backward_input(self, saved, gy):
        x, h = saved
        gh = gy * (1 - h * h) / 2
        return gy + gh @ self.w.T, (x, gh)

    def backward_weight(self, rest):
        x, gh = rest
        self.gradients[0] += x.T @ gh
        self.gradients[1] += gh.sum(axis=0)


class Head:
    """The last layer: scores of the classes."""

    def __init__(self):
        random = np.random.default_rng(LAYERS)
        self.w = random.standard_normal((WIDTH, CLASSES)) / WIDTH**0.5
        self.parameters, self.gradients = [self.w], [np.zeros_like(self.w)]

    def forward(self, x):
        return x @ self.w, x

    def backward_input(self, x, gy):
        return gy @ self.w.T, (x, gy)

    def backward_weight(self, rest):
        x, gy = rest
        self.gradients[0] += x.T @ gy


class Stage:
    """Some consecutive layers, as a meshring.PipelineStage."""

    def __init__(self, layers):
        self.layers = layers
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        saved = []
        for layer in self.layers:
            x, kept = layer.forward(x)
            saved.append(kept)
        return x, saved

    def backward_input(self, saved, gy):
        rest = []
        for layer, kept in zip(reversed(self.layers), reversed(saved), strict=True):
            gy, left = layer.backward_input(kept, gy)
            rest.append((layer, left))
        return gy, rest

    def backward_weight(self, rest):
        for layer, left in rest:
            layer.backward_weight(left)

    def gradients(self):
        return [gradient for layer in self.layers for gradient in layer.gradients]

    def step(self):
        """Descend along the gradients and clear them."""
        for layer in self.layers:
            for parameter, gradient in zip(layer.parameters, layer.gradients, strict=True):
                parameter -= RATE * gradient
                gradient[...] = 0


def make_stage(number, count):
    """Stage `number` of `count`: its share of the layers, the head in the last one."""
    mine = np.array_split(np.arange(LAYERS), count)[number]
    layers = [Layer(int(i)) for i in mine]
    return Stage([*layers, Head()] if number == count - 1 else layers)


def cross_entropy(total):
    """The loss of a microbatch as a part of that of `total` rows, and its gradient."""

    def loss(scores, labels):
        shifted = scores - scores.max(axis=1, keepdims=True)
        chance = np.exp(shifted)
        chance /= chance.sum(axis=1, keepdims=True)
        rows = np.arange(len(labels))
        value = -np.log(chance[rows, labels]).sum() / total
        chance[rows, labels] -= 1
        return value, chance / total

    return loss


def one_process(batches):
    """The losses of the same training without a pipeline."""
    stage, losses = make_stage(0, 1), []
    for x, labels in batches:
        scores, saved = stage.forward(x)
        value, gradient = cross_entropy(len(x))(scores, labels)
        stage.backward_weight(stage.backward_input(saved, gradient)[1])
        stage.step()
        losses.append(value)
    return losses


def digits(comm):
    """The pictures, as rows of 64 numbers, and their labels; rank 0 loads them for all."""
    x, labels = np.empty((1797, 64)), np.empty(1797, np.int64)
    if comm.rank == 0:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise SystemExit("this example needs scikit-learn: pip install scikit-learn") from None
        x[...], labels[...] = load_digits(return_X_y=True)
        x /= 16
    return comm.broadcast(x), comm.broadcast(labels)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--checkpoint", action="store_true", help="recompute forwards")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=250, help="rows of a step")
    parser.add_argument("--svg", help="a picture of the last step, simulated and measured")
    args = parser.parse_args()

    comm = mr.init()
    x, labels = digits(comm)
    starts = [i * args.batch % (len(x) - args.batch + 1) for i in range(args.steps)]
    batches = [(x[i : i + args.batch], labels[i : i + args.batch]) for i in starts]
    losses = []
    with mr.build_pipeline(
        make_stage,
        args.microbatches,
        args.schedule,
        comm=comm,
        loss=cross_entropy(args.batch),
        gradient_checkpointing=args.checkpoint,
    ) as pipeline:
        for x, labels in batches:
            result = pipeline.run(x, labels, record=args.svg is not None)
            for stage in pipeline.stages.values():
                stage.step()
            mine = np.array([0.0 if result.loss is None else result.loss])
            losses.append(float(comm.all_reduce(mine)[0]))
        schedule, forwards = pipeline.schedule, sum(s.forwards for s in pipeline.stages.values())
    total = int(comm.all_reduce(np.array([forwards]))[0])
    if comm.rank == 0:
        expected = one_process(batches)
        worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        print(f"{schedule}")
        print(f"loss {losses[0]:.6f} -> {losses[-1]:.6f} in {args.steps} steps, {total} forwards")
        print(f"differs from one process by at most {worst:.1e}")
        if args.svg:
            measured = result.timeline
            simulated = schedule.simulate(unit="s", **measured.durations(schedule.num_stages))
            simulated.title += ", simulated"
            measured.save(args.svg, beside=[simulated])
        if worst > 1e-6:
            raise SystemExit("the losses differ")
    comm.close()


if __name__ == "__main__":
    main()
