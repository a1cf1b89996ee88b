"""Weights that a training loop hands over step by step: a writer of patches, and readers that follow it.

writer = PatchWriter(model, "s3://bucket/run")     # in the trainer
for batch in batches:
    train(model, batch)
    writer.step()                                  # what changed goes out in a thread

reader = PatchReader(server_model, "s3://bucket/run")
reader.update()                                    # the newest version, to the bit
"""

import json
import os
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from types import TracebackType

import torch
from torch import Tensor, nn

from ..adapter.chain import base_of_chain, merged
from ..adapter.content import About, Parts
from ..adapter.header import canonical_json
from ..adapter.read import Adapter
from ..adapter.write import save_adapter
from ..backbone.fingerprint import all_digests, check_measured, joined_digests, measure_body
from ..backbone.model import STATISTICS, Fingerprint, body, same_size_int, source_of
from ..codecs.base import Profile
from ..errors import BackboneMismatchError, ConfigError, CorruptAdapterError, DataError, StateError
from ..hub.versions import Versions, patch_name, refuse_second_writer, whole_name
from ..mask import MaskSet, PackedMask
from ..safetensors_io import Made, TensorFile, read_tensors, write_tensors
from .apply import apply_parts, check_free, check_masks, forget, tensors_of

DIGESTS = "maskpack_digests"  # key in the metadata of a whole checkpoint
Where = str | os.PathLike[str]


class PatchWriter(AbstractContextManager["PatchWriter"]):
    """Writes a patch of a model's weights for each step of a training loop, into a folder of versions.

    It holds one copy of the weights. `step` compares with it and returns; a thread codes and sends what changed, and
    the next step waits for that. What could not be sent is part of the next patch.

    Args:
        model: whose weights are handed over, all but integer buffers.
        where: folder, or a URL that fsspec knows, as `s3://bucket/run` or `hf://user/name`.
        every: a whole checkpoint with every so many versions, for readers that start late; 0: none.
        dtype: what weights are rounded to before they are compared, as bfloat16 of a model in float32; None: their own.
        profile: as of `save_adapter`; "fast" and "default" take less time and more bytes.

    Attributes:
        version: number of the newest version; 0 where readers need nothing but the model as it was at first.

    Example:
        with PatchWriter(model, "./run") as writer:
            writer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        where: Where,
        *,
        every: int = 50,
        dtype: torch.dtype | None = None,
        profile: Profile = "max",
    ) -> None:
        if every < 0:
            raise ConfigError(f"every must be 0 or more versions, got {every}")
        check_free(model)
        self.every, self.dtype, self.profile = every, dtype, profile
        self._tensors, self._id = body(model), source_of(model)
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._copy = {name: self._seen(tensor).clone() for name, tensor in self._tensors.items()}
        self._digests = all_digests(self._copy)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.versions = Versions(where).look()
        self.version = self.versions.newest
        if self.version and newest_state(self.versions) != self._state.digests:
            self.version += 1  # a run that goes on from other weights than the newest
            self._write_whole(self.version)

    def _seen(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", self.dtype or tensor.dtype)

    @property
    def _state(self) -> Fingerprint:
        return joined_digests(self._copy, self._digests, *self._id)

    @torch.no_grad()
    def step(self) -> int:
        """Hand over what changed since the last step, and return the number of the version, the last if nothing did.

        Raises what went wrong with the step before, if anything did; its changes are part of this one, if it is called
        again.
        """
        self.wait()
        changes = dict[str, tuple[Tensor, Tensor]]()  # places, and what stood there
        for name, tensor in self._tensors.items():
            new, old = same_size_int(self._seen(tensor)).reshape(-1), same_size_int(self._copy[name]).view(-1)
            at = (new != old).nonzero()[:, 0]
            if len(at):
                changes[name] = at, old[at]
                old[at] = new[at]
        if changes:
            self._thread = threading.Thread(target=self._publish, args=(changes,), name="maskpack-patch", daemon=False)
            self._thread.start()
            return self.version + 1
        return self.version

    def wait(self) -> None:
        """Wait until the last step is sent; raise what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait until all is sent."""
        self.wait()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.wait()

    def _publish(self, changes: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        before, number = self._state, self.version + 1
        known = {cast: dict(each) for cast, each in self._digests.items()}
        try:
            for cast, each in all_digests({name: self._copy[name] for name in changes}).items():
                self._digests[cast].update(each)
            refuse_second_writer(self.versions, number)
            if self.every and number % self.every == 0:
                self._write_whole(number)
            self._write_patch(number, before, changes)
            self.version = number
        except BaseException as error:
            if self._arrived(number):  # although the answer never came
                self.version = number
                return
            self._digests = known
            for name, (at, old) in changes.items():
                same_size_int(self._copy[name]).view(-1)[at] = old
            self._error = error

    def _arrived(self, number: int) -> bool:
        with suppress(Exception):
            return number in self.versions.look().patches and newest_state(self.versions) == self._state.digests
        return False

    def _write_patch(self, number: int, before: Fingerprint, changes: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        def old(name: str) -> Tensor:
            found = self._copy[name].clone()
            if name in changes:
                at, bits = changes[name]
                same_size_int(found).view(-1)[at] = bits
            return found

        def mask(name: str) -> PackedMask:
            kept = torch.ones(self._copy[name].numel(), dtype=torch.bool)
            kept[changes[name][0]] = False
            return PackedMask.from_tensor(kept.reshape(self._copy[name].shape), "replace")

        own = {name: tuple(self._copy[name].shape) for name in changes if name in self._parameters}
        statistics = {name: self._copy[name] for name in changes if name not in own}
        known = (name for name, one in statistics.items() if name.endswith(STATISTICS) and one.dtype == torch.float32)
        if wrong := sorted(statistics.keys() - set(known)):
            raise StateError(f"the buffer {wrong[0]!r} changed, and a patch holds parameters and BatchNorm statistics")
        values = Made(own, lambda name: self._copy[name].view(-1)[changes[name][0]])
        parts = Parts(MaskSet.streamed(own, mask, own), statistics=statistics, values=values)
        if not own:
            raise StateError("only BatchNorm statistics changed, and a patch needs a parameter; train one, or wait")
        about, weights = About(result=self._state.digests), Made(self._copy, old)
        with self.versions.adding(patch_name(number)) as path:
            save_adapter(path, parts, before, about, profile=self.profile, weights=weights)

    def _write_whole(self, number: int) -> None:
        with self.versions.adding(whole_name(number)) as path:
            metadata = {"format": "pt", DIGESTS: canonical_json(self._state.digests)}
            write_tensors(path, self._copy, metadata)


def newest_state(versions: Versions) -> Mapping[str, str] | None:
    """Return the digests of the newest version, which must be there."""
    if versions.newest in versions.patches:
        return versions.patch(versions.newest).about.result
    with versions.whole(versions.newest) as path:
        found: Mapping[str, str] = json.loads(TensorFile(path).metadata[DIGESTS])
        return found


class PatchReader:
    """Keeps a model at the newest version that a `PatchWriter` wrote.

    Args:
        model: the base that the first patch stands on, or any weights of these names and shapes where there is a whole
            checkpoint. Nothing else may write it.
        where: as of `PatchWriter`.

    Attributes:
        version: number of the version that the model has; 0 for what it was at first.

    Example:
        reader = PatchReader(model, "./run")
        reader.update()
    """

    def __init__(self, model: nn.Module, where: Where) -> None:
        check_free(model)
        self.model, self.versions, self.version = model, Versions(where), 0
        self._measured = measure_body(model, ())

    def update(self) -> int:
        """Apply what is new, and return the number of the version that the model has now.

        Versions are read from the newest back to what the model has, or to a whole checkpoint. If it fails or is
        interrupted, the model has a version, the old one or, behind a whole checkpoint, that one, to the bit.

        Raises:
            BackboneMismatchError: if no version leads from the model's weights to the newest.
            CorruptAdapterError: if an earlier version than the newest is damaged. HubError: if it cannot be fetched.
        """
        newest = self.versions.look().newest
        if newest <= self.version:
            return self.version
        self._measured = measure_body(self.model, ())
        try:
            start, patches = self._back(newest)
        except CorruptAdapterError:
            if not self._is_damaged(newest):
                raise
            newest -= 1  # it is not whole yet
            if newest <= self.version:
                return self.version
            start, patches = self._back(newest)
        if start:
            self._replace(start)
        if patches:
            check_measured(self._measured, base_of_chain(patches))
            parts = merged(patches, tensors_of(self.model))
            check_masks(self.model, parts.masks.shapes)
            self._put(parts, patches[-1].about.result)
        self.version = newest
        return newest

    def _is_damaged(self, number: int) -> bool:
        try:
            return number in self.versions.patches and not self.versions.patch(number)
        except CorruptAdapterError:
            return True

    def _back(self, newest: int) -> tuple[int, list[Adapter]]:
        """Return the whole checkpoint to begin with, 0 for none, and the patches to apply then."""
        patches, number = list[Adapter](), newest
        while number > self.version:
            patch = self.versions.patch(number) if number in self.versions.patches else None
            if patch is not None and (0 < self.version == number - 1 or self._stands_here(patch)):
                return 0, [patch, *patches]
            if number in self.versions.wholes:
                return number, patches
            if patch is None:
                break
            patches.insert(0, patch)
            number -= 1
        raise BackboneMismatchError(
            f"{self.versions.where} has versions up to {newest}, and from version {number} none that stands on the "
            f"model's weights (version {self.version}), nor a whole checkpoint; load the weights that the run began "
            f"with, or let the writer make whole checkpoints (every=N)"
        )

    def _stands_here(self, patch: Adapter) -> bool:
        try:
            check_measured(self._measured, patch.base)
        except BackboneMismatchError:
            return False
        return True

    def _replace(self, number: int) -> None:
        with self.versions.whole(number) as path:
            try:
                tensors, digests = read_tensors(path), json.loads(TensorFile(path).metadata[DIGESTS])
            except (DataError, KeyError, ValueError) as error:
                raise CorruptAdapterError(f"{self.versions.where}/{whole_name(number)} is damaged: {error}") from None
            self._put(Parts(MaskSet({}), parameters=tensors), digests)
        self.version = number

    def _put(self, parts: Parts, digests: Mapping[str, str] | None) -> None:
        """Apply parts, compare the whole body, and keep nothing; after any error the weights are what they were."""

        def check() -> None:
            self._measured = measure_body(self.model, ())
            if digests is not None and self._measured.digest not in digests.values():
                raise CorruptAdapterError(
                    f"{self.versions.where} has a version with other weights than it says, so that the model was put "
                    f"back; tell whoever writes there"
                )

        apply_parts(self.model, parts, check=check)
        forget(self.model)
