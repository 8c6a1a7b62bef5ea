"""Given initial weights: read once in the driver, copied into the run's folder, loaded from there by every worker."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import pyarrow
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.model import decode_generator, generator_sha256
from pipeline.model.encoding import encode_tensors
from pipeline.model.initial import Fit, discriminator_sizes, fit, read_discriminator_tensors
from pipeline.model.weights import generator_sizes, read_generator_tensors, read_tensors
from pipeline.run_folder import IDENTITY, SWEEP, InitialWeights, RunIdentity
from pipeline.section import with_fields
from pipeline.storage import Storage
from pipeline.tracking.uri import resolve_uri
from pipeline.training import checkpoint as checkpoints
from pipeline.training.config import TrainConfig
from pipeline.training.distributed import unwrap
from pipeline.training.identity import has_begun
from pipeline.training.init_config import NETWORKS
from pipeline.training.model_source import GENERATOR_FILE, TRAINING_FILE, find_model_file
from pipeline.training.state import TrainState, build_discriminator, build_generator


@dataclass(frozen=True, eq=False)
class Initial:
    """Initial weights of one network."""

    origin: InitialWeights
    tensors: dict[str, Tensor] | None
    """In float32, by the network's names; None if a resumed run needs them no more."""
    stored: bool = False
    """Whether the run's folder has the copy."""


def resolve_for_run(
    config: TrainConfig, run: Storage, old: RunIdentity | None, shared: Storage | None = None
) -> tuple[TrainConfig, dict[str, Initial]]:
    """`resolve` for a run: one that has begun (`old` is its identity) keeps its weights, and may need none of them."""
    begun = old is not None and has_begun(run)
    needed: Collection[str] = NETWORKS
    if begun and not config.init.adopt_sizes:
        listed = checkpoints.listed(run)
        needed = ("discriminator",) if listed and listed[-1].stage == "psnr" else ()
    stored = old.initial if old else {}
    return resolve(config, run, stored, begun=begun, needed=needed, shared=shared)


def resolve(
    config: TrainConfig,
    folder: Storage,
    stored: Mapping[str, InitialWeights],
    *,
    begun: bool,
    needed: Collection[str] = NETWORKS,
    shared: Storage | None = None,
) -> tuple[TrainConfig, dict[str, Initial]]:
    """Reads init.generator and init.discriminator, and checks that they fit the configured networks.

    Args:
        folder: the run's or sweep's folder.
        stored: initial weights of an earlier attempt.
        begun: whether `stored` is kept if the sources have the same names, whatever they contain now.
        needed: networks whose tensors are needed.
        shared: folder of the sweep that the run is a trial of; its copies take the place of the sources.

    Returns:
        The configuration, with the files' sizes if init.adopt_sizes is set, and the weights by network.

    Raises:
        UserError: missing, unreadable, not such a network, or of other sizes than configured.
    """
    initial = {}
    for network in NETWORKS:
        source = getattr(config.init, network)
        if source is not None:
            same = network in stored and stored[network].source == source
            earlier = stored[network] if same else None
            if earlier is not None and begun and network not in needed:
                initial[network] = Initial(earlier, None, stored=True)
            else:
                initial[network] = _find(config, network, folder, earlier, begun, shared)
    if config.init.adopt_sizes:
        sizes = [_sizes(config, network, weights).items() for network, weights in initial.items()]
        config = with_fields(
            config, {name: size for name, size in chain(*sizes) if name.startswith("model.")}
        )
    require_fit(config, initial)
    return config, initial


def require_fit(config: TrainConfig, initial: Mapping[str, Initial]) -> None:
    """Checks that the weights fit the configured networks. Raises UserError."""
    for network, weights in initial.items():
        if weights.tensors is not None:
            _fit(config, network, weights)


def origins(initial: Mapping[str, Initial]) -> dict[str, InitialWeights]:
    """What a run's or sweep's identity records of the weights."""
    return {network: weights.origin for network, weights in initial.items()}


def save_copies(folder: Storage, initial: Mapping[str, Initial]) -> None:
    """Writes copies of the weights to the run's or sweep's folder. Raises OSError."""
    for network, weights in initial.items():
        if weights.tensors is not None and not weights.stored:
            folder.write_bytes(_file(network), encode_tensors(weights.tensors))


def load_initial(network: str, state: TrainState, config: TrainConfig, run: Storage) -> str:
    """Loads the run's copy into a network (the generator's also into the EMA weights); the same on every rank.

    Returns what was loaded, for the log; empty if no weights are given. Raises UserError: no copy, or a corrupt one.
    """
    if getattr(config.init, network) is None:
        return ""
    identity = IDENTITY.read(run)
    assert identity is not None
    origin = identity.initial[network]
    taken = _fit(config, network, _copy(run, network, origin))
    targets: list[nn.Module] = [state.generator, state.ema]
    if network == "discriminator":
        assert state.discriminator is not None
        targets = [state.discriminator]
    for target in targets:
        unknown = unwrap(target).load_state_dict(taken.tensors, strict=False).unexpected_keys
        assert not unknown, unknown
    return (
        f"{network} from {origin.version or origin.source} (sha256 {origin.sha256[:12]}): {taken.summary()}"
    )


def _find(
    config: TrainConfig,
    network: str,
    folder: Storage,
    earlier: InitialWeights | None,
    begun: bool,
    shared: Storage | None,
) -> Initial:
    """Weights from the folder's copy if it has begun, else from the sweep's copy, else from the source."""
    if earlier is not None and begun:
        with suppress(UserError):  # then from the source, if that has not changed
            return _copy(folder, network, earlier)
    source = getattr(config.init, network)
    sweep = SWEEP.read(shared) if shared else None
    if shared and sweep and network in sweep.initial and sweep.initial[network].source == source:
        copy = _copy(shared, network, sweep.initial[network])
        return Initial(copy.origin, copy.tensors)
    try:
        return _read(config, network)
    except UserError as error:
        if earlier is not None:
            with suppress(UserError):
                copy = _copy(folder, network, earlier)
                print(f"{error}; using the copy in {folder.path(_file(network))}", flush=True)
                return copy
        raise


def _read(config: TrainConfig, network: str) -> Initial:
    """Weights from their source."""
    source = getattr(config.init, network)
    name = f"init.{network}={source}"
    version = model_id = run_id = ""
    residual_scale = None
    if source.startswith("models:/"):
        if network == "discriminator":
            raise UserError(
                f"{name}: registered models have no discriminator; give a checkpoint's folder or a file"
            )
        # Not at the top: a worker does not need MLflow.
        from pipeline.tracking.lookup import pull_with_origin

        try:
            pulled = pull_with_origin(source, resolve_uri(config.tracking, config.storage))
        except UserError as error:
            raise UserError(f"init.{network}: {error}") from None
        content = pulled.path.read_bytes()
        version, model_id, run_id = pulled.version, pulled.model_id, pulled.run_id
    else:
        file = GENERATOR_FILE if network == "generator" else TRAINING_FILE
        content, _ = find_model_file(source, file, name)
    if network == "discriminator":
        tensors = read_discriminator_tensors(content, name)
    else:
        tensors, metadata = read_generator_tensors(content, name)
        if not config.init.partial:
            decode_generator(content, name)
        if "residual_scale" in metadata:
            residual_scale = float(generator_sizes(tensors, metadata, name)["residual_scale"])
    tensors = {
        key: (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        for key, tensor in tensors.items()
    }
    origin = InitialWeights(source, generator_sha256(tensors), residual_scale, version, model_id, run_id)
    return Initial(origin, tensors)


def _copy(folder: Storage, network: str, origin: InitialWeights) -> Initial:
    """Weights from a folder's copy, verified."""
    name = folder.path(_file(network))
    try:
        content = folder.read_bytes(_file(network))
    except (OSError, pyarrow.ArrowException):
        raise UserError(f"{name}: missing; it has the weights of init.{network}={origin.source}") from None
    tensors, _ = read_tensors(content, name)
    if generator_sha256(tensors) != origin.sha256:
        raise UserError(f"{name}: corrupt; it has the weights of init.{network}={origin.source}")
    return Initial(origin, tensors, stored=True)


def _fit(config: TrainConfig, network: str, weights: Initial) -> Fit:
    """The part of the weights that the configured network takes. Raises UserError."""
    assert weights.tensors is not None
    name = f"init.{network}={weights.origin.source}"
    with torch.device("meta"):
        target = build_generator(config) if network == "generator" else build_discriminator(config)
    found = fit(weights.tensors, target.state_dict())
    if config.init.partial:
        if not found.tensors:
            raise UserError(
                f"{name}: no layer fits the configured {network} by name and shape; change its sizes in model, or use "
                "other weights"
            )
        return found
    differing = [
        (field, size)
        for field, size in _sizes(config, network, weights).items()
        if size != attrgetter(field)(config)
    ]
    if differing:
        adoptable = all(field.startswith("model.") for field, _ in differing)
        raise UserError(
            f"{name}: the configured {network} has other sizes; set "
            + ", ".join(f"{field}={size}" for field, size in differing)
            + (", or init.adopt_sizes=true" if adoptable else "")
            + " (init.partial=true takes the layers that fit)"
        )
    if not found.complete:
        raise UserError(
            f"{name}: not the weights of this {network}: {found.summary()}; init.partial=true takes the layers that fit"
        )
    return found


def _sizes(config: TrainConfig, network: str, weights: Initial) -> dict[str, Any]:
    """The configuration fields that describe the network in the file. Raises UserError."""
    assert weights.tensors is not None
    name = f"init.{network}={weights.origin.source}"
    if network == "discriminator":
        sizes = discriminator_sizes(weights.tensors, name)
        fields = {"model.discriminator": sizes["kind"], "model.discriminator_num_feat": sizes["num_feat"]}
        return fields | ({"crop_px": sizes["input_px"]} if "input_px" in sizes else {})
    sizes = generator_sizes(weights.tensors, {}, name)
    fields = {f"model.{size}": sizes[size] for size in ("num_block", "num_feat", "num_grow_ch")}
    # A file without a residual scale leaves it to the configuration.
    if weights.origin.residual_scale is not None:
        fields["model.residual_scale"] = weights.origin.residual_scale
    return fields | {"data.scale": sizes["scale"]}


def _file(network: str) -> str:
    return f"initial/{network}.safetensors"
