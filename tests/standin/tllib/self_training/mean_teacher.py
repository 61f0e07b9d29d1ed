import copy


def set_requires_grad(net, requires_grad=False):
    for parameter in net.parameters():
        parameter.requires_grad = requires_grad


class EMATeacher(object):
    def __init__(self, model, alpha):
        self.model, self.alpha = model, alpha
        self.teacher = copy.deepcopy(model)
        set_requires_grad(self.teacher)

    def set_alpha(self, alpha):
        assert alpha >= 0
        self.alpha = alpha

    def update(self):
        for teacher, student in zip(self.teacher.parameters(), self.model.parameters()):
            teacher.data = self.alpha * teacher.data + (1 - self.alpha) * student.data

    def __call__(self, x):
        return self.teacher(x)

    def train(self, mode=True):
        self.teacher.train(mode)

    def eval(self):
        self.train(False)

    def state_dict(self):
        return self.teacher.state_dict()

    def load_state_dict(self, state_dict):
        self.teacher.load_state_dict(state_dict)

    @property
    def module(self):
        return self.teacher.module


def update_bn(model, ema_model):
    for (ema_name, ema), (name, module) in zip(ema_model.named_modules(), model.named_modules()):
        if "bn" in ema_name and "bn" in name:
            for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                ema.state_dict()[buffer].copy_(module.state_dict()[buffer])
