"""Linear probe: the accuracy of a frozen backbone's features, the row to compare a mask with."""

from torch import nn

from ..backbone.classifier import Classifier, features
from ..backbone.head import swap_module
from ..backbone.load import Backbone
from ..data.base import Data, Examples
from ..data.batches import loader, readable
from ..errors import DataError, require

PENALTY = 0.01  # times 1 / n; methods-spec section 5.2


def linear_probe(backbone: Backbone, data: Data, *, batch_size: int = 64) -> dict[str, float]:
    """Fit a multinomial logistic regression on unaugmented features of the frozen backbone.

    A convex solve (L2 penalty 0.01 / n, features as they are), so there is no learning rate and no seed.

    Returns:
        {"train_accuracy", "test_accuracy"}.

    Raises:
        DataError: if the data have no training or test split.
        MissingDependencyError: if scikit-learn is not installed.
    """
    if data.train is None or data.test is None:
        raise DataError(f"a linear probe needs a train and a test split; {data.id!r} lacks one")
    linear_model = require("sklearn.linear_model", "train", "the linear probe")
    head = backbone.head
    linear = nn.Linear(backbone.features, 1)
    old = backbone.model.get_submodule(head) if head is not None else None
    classifier = Classifier(backbone.model, linear, head, backbone.pooling, backbone.normalize)

    def embedded(examples: Examples) -> tuple[object, object]:
        batches = loader(examples, backbone.preprocess, backbone.tokenizer, batch_size=batch_size)
        x, y = features(classifier, readable(batches))
        return x.double().numpy(), y.numpy()

    try:
        x, y = embedded(data.train)
        test_x, test_y = embedded(data.test)
    finally:
        if head is not None and old is not None:
            swap_module(backbone.model, head, old)
    solver = linear_model.LogisticRegression(C=1 / PENALTY, max_iter=5000, tol=1e-4)
    solver.fit(x, y)
    return {"train_accuracy": float(solver.score(x, y)), "test_accuracy": float(solver.score(test_x, test_y))}
