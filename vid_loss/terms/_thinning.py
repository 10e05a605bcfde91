"""The part of the teacher's maps that a step takes, while the student has yet to run."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Size, Tensor, nn

from vid_loss.losses.positions import Lattice
from vid_loss.losses.vid import VIDLoss, joins
from vid_loss.pairs import Pair

from ._features import Features, Part

# Pairs that have a weight, and the loss of each.
InUse = Sequence[tuple[Pair, nn.Module]]
# Where each batch has other sizes, as lists of images have, none comes twice.
_MOST = 1000


class Thinning:
    """Drops what no loss takes of the teacher's maps, before they wait for the student's.

    A VIDLoss with ``positions=`` takes a lattice of two maps of one size. Whether they are of one
    size is known of inputs like those of an earlier step. The lattice is drawn before the student
    runs in any case: what a step draws must not depend on which steps there were before it in this
    process, or no run could be resumed exactly.
    """

    def __init__(self) -> None:
        # Layers of the teacher, with the inputs' shapes and the size of the layer's map.
        self._alike: set[tuple[str, tuple[Size, ...], Size]] = set()

    def thin(self, features: Features, inputs: Sequence[Tensor], pairs: InUse) -> None:
        """Puts parts in the place of maps.

        Args:
            features: of the teacher, all of each map.
            inputs: of the step.
            pairs: that take the features.
        """
        features.inputs = tuple(x.shape[1:] for x in inputs)
        parts, lattices = {}, {}
        for layer, share in _shares(pairs).items():
            feature = features[layer]
            if feature.ndim != 4:
                continue
            lattices[layer] = lattice = Lattice.drawn(feature, share)
            if (layer, features.inputs, lattice.size) in self._alike:
                parts[layer] = Part.of(features.pop(layer), lattice)
        features.parts, features.lattices = parts, lattices

    def learn(self, students: Mapping[str, Tensor], features: Features, pairs: InUse) -> None:
        """Takes the part of whole maps of which the students' have the size, and notes them.

        Raises:
            RuntimeError: if a pair needs all of a map of which a part is left.
        """
        shares = _shares(pairs)
        for pair, _ in pairs:
            if pair.teacher in features.parts and pair.teacher not in shares:
                raise RuntimeError(
                    f"{pair}: expected the pairs and weights that there were when the teacher ran; "
                    "got others, which need more of its map than is left. Change them between "
                    "steps, not while the student runs."
                )
        for layer in shares.keys() & features.lattices.keys() & features.keys():
            lattice = features.lattices[layer]
            sizes = {students[pair.student].shape[2:] for pair, _ in pairs if pair.teacher == layer}
            if sizes == {lattice.size}:
                if len(self._alike) >= _MOST:
                    self._alike.clear()
                self._alike.add((layer, features.inputs, lattice.size))
                part = Part.of(features[layer], lattice)
                features.parts = {**features.parts, layer: part}


def takes_parts(losses: Iterable[nn.Module]) -> bool:
    """Whether any VIDLoss takes a share of a map's positions."""
    return any(isinstance(loss, VIDLoss) and loss.positions < 1 for loss in losses)


def _shares(pairs: InUse) -> dict[str, float]:
    """Returns the teacher's layers of which all losses take the same part, and how large it is."""
    shares: dict[str, set[float]] = {}
    for pair, loss in pairs:
        share, changed = 1.0, (pair.channel_dim, pair.student_transform, pair.teacher_transform)
        if joins(loss) and loss.training and changed == (None, None, None):
            share = loss.positions
        shares.setdefault(pair.teacher, set()).add(share)
    return {layer: min(x) for layer, x in shares.items() if len(x) == 1 and min(x) < 1}
