"""A weight with scores, and what the scores of one model have in common."""

from torch import Tensor, nn

from ..mask import PackedMask
from ..methods.base import Method, State
from .parametrized import Orders
from .recompute import Recompute


class ScoredWeight(nn.Module):
    """Parametrization that computes the effective weight from the frozen weight and its scores.

    Attributes:
        scores: float32, of a shape that the method chose.
        model: what the scores of one model share.
    """

    def __init__(self, weight: Tensor, scale: bool, model: "ScoredModel"):
        super().__init__()
        self.method, self.scale, self.model = model.method, scale, model
        self.shape = tuple(weight.shape)
        self.scores = nn.Parameter(self.method.init_scores(weight.detach()), requires_grad=self.method.learns)

    def forward(self, weight: Tensor) -> Tensor:
        if self.model.off:
            return weight
        state = self.state(self.training)
        result = self.method.effective(weight, self.scores, self.scale, state)
        if not (self.method.draws and state.training):
            scores = self.scores
            self.model.recompute.note(
                result, lambda: self.method.effective(weight, scores, self.scale, state), weight, scores
            )
        return result

    def state(self, training: bool = False) -> State:
        """Return what the method is told beside the scores."""
        model = self.model
        return State(model.progress, training, model.shared(self), self.shape, model.batch_size)

    def binary(self) -> Tensor:
        """Return the mask that the scores stand for, bool."""
        return self.method.binarize(self.scores.detach(), self.state())

    def mask(self) -> PackedMask:
        """Return the mask that the scores stand for, packed."""
        return self.method.packed(self.scores.detach(), self.scale, self.state())

    def penalty(self) -> Tensor | None:
        """Return what the method adds to the loss of a step."""
        return self.method.penalty(self.scores, self.state(training=True))


class ScoredModel:
    """What the scores of one model have in common.

    Attributes:
        members: in the order of their names.
        progress: share of the training steps that are done. batch_size: examples of an optimiser step.
        off: compute with the weights as they are.
        orders: what taking the scores off needs. recompute: makes effective weights again for backward passes.
    """

    def __init__(self, method: Method):
        self.method = method
        self.members: list[ScoredWeight] = []
        self.orders: Orders = {}
        self.progress = 1.0
        self.batch_size = 1
        self.off = False
        self.recompute = Recompute()
        self._made: tuple[object, dict[ScoredWeight, Tensor]] | None = (None, {})

    def shared(self, one: ScoredWeight) -> Tensor | None:
        """Return what the method tells a member of all scores, made anew when these have changed."""
        if self._made is None:
            return None
        now = self.progress, [(id(member.scores), member.scores._version) for member in self.members]
        if self._made[0] != now:
            found = self.method.shared([member.scores for member in self.members], self.progress)
            if found is None:
                self._made = None
                return None
            self._made = now, dict(zip(self.members, found, strict=True))
        return self._made[1][one]
