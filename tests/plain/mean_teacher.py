"""The moving average of a teacher in plain PyTorch."""

import copy


class EMATeacher:
    """Reallocates every parameter at every update."""

    def __init__(self, model, alpha):
        self.model, self.alpha = model, alpha
        self.teacher = copy.deepcopy(model)
        for parameter in self.teacher.parameters():
            parameter.requires_grad = False

    def update(self):
        """Move the teacher towards the student."""
        for teacher, student in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            teacher.data = self.alpha * teacher + (1 - self.alpha) * student
