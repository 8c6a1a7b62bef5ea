"""VGG19 features: torchvision's network, before activation; weights that are missing, corrupt or local."""

import hashlib
import http.server
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import vgg

from pipeline.errors import UserError
from pipeline.model import LAYERS, VGGFeatures, generator_sha256
from pipeline.model import features as module
from pipeline.model.features import find_weights

NAMES = ["conv1_1", "conv1_2", "conv2_2", "conv3_4", "conv4_4", "conv5_4"]


@pytest.fixture(scope="module")
def torchvision_features() -> nn.Sequential:
    """The convolutional part of torchvision's VGG19, with its in-place ReLUs and random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = vgg.make_layers(vgg.cfgs["E"])
        for layer in network:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return network.eval()


@pytest.fixture(scope="module")
def weights(torchvision_features: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    state = {f"features.{name}": tensor for name, tensor in torchvision_features.state_dict().items()}
    torch.save({**state, "classifier.0.bias": torch.zeros(4)}, path)
    return path


def hooked(network: nn.Sequential, images: Tensor) -> dict[str, Tensor]:
    """Outputs of the convolutions, copied before the in-place ReLU that follows them."""
    outputs: dict[int, Tensor] = {}
    handles = []
    for number, layer in enumerate(network):
        if isinstance(layer, nn.Conv2d):

            def keep(_: nn.Module, __: object, output: Tensor, number: int = number) -> None:
                outputs[number] = output.clone()

            handles.append(layer.register_forward_hook(keep))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    network((images - mean) / std)
    for handle in handles:
        handle.remove()
    return {name: outputs[number] for name, number in LAYERS.items()}


def test_features_are_torchvisions_before_activation(
    torchvision_features: nn.Sequential, weights: Path
) -> None:
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        outputs = VGGFeatures(NAMES, weights)(images)
        expected = hooked(torchvision_features, images)
    assert list(outputs) == NAMES
    for name in NAMES:
        assert outputs[name].min() < 0, f"{name} was activated"
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-5)


def test_a_layers_features_do_not_depend_on_the_other_layers() -> None:
    images = torch.rand(1, 3, 32, 32)
    together = VGGFeatures(["conv2_1", "conv2_2", "conv3_1"], "random")(images)
    for name, tensor in together.items():
        alone = VGGFeatures({name: 1.0}, "random")
        assert torch.equal(alone(images)[name], tensor)


def test_the_network_ends_at_the_deepest_given_layer() -> None:
    features = VGGFeatures({"conv2_2": 1.0, "conv1_1": 0.5}, "random")
    convolutions = [i for i, layer in enumerate(features.features) if isinstance(layer, nn.Conv2d)]
    assert convolutions == [0, 2, 5, 7]
    assert len(features.features) == 8


def test_layers_are_numbered_as_in_torchvision() -> None:
    convolutions = [
        i for i, layer in enumerate(vgg.make_layers([8, 8, "M", *[8] * 2, "M"])) if layer._parameters
    ]
    assert convolutions == [LAYERS[name] for name in ("conv1_1", "conv1_2", "conv2_1", "conv2_2")]
    assert (LAYERS["conv5_4"], LAYERS["conv3_1"], len(LAYERS)) == (34, 10, 16)


def test_features_are_frozen_but_pass_gradients_to_the_image() -> None:
    features = VGGFeatures(["conv1_2"], "random").train()
    image = torch.rand(1, 3, 16, 16, requires_grad=True)
    features(image)["conv1_2"].abs().mean().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_features_run_in_double_precision() -> None:
    features = VGGFeatures(["conv1_2"], "random").double()
    image = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    assert features(image)["conv1_2"].dtype == torch.float64


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    a = VGGFeatures(["conv1_2"], "random", seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    b, c = VGGFeatures(["conv2_1"], "random", seed=3), VGGFeatures(["conv1_2"], "random", seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.features[2].weight, b.features[2].weight)
    assert not torch.equal(a.features[2].weight, c.features[2].weight)


def test_random_weights_stay_the_same_bits() -> None:
    """Runs with random features are compared with earlier ones, so a seed's weights must not change."""
    state = VGGFeatures(["conv5_4"], "random", seed=3).state_dict()
    assert generator_sha256(state) == "44ef5aa84a611cf0367c82351c85548f3cc2a22e2a582410f617c2099a0af350"


def test_random_features_keep_their_size_through_all_layers() -> None:
    with torch.no_grad():
        spreads = [x.std().item() for x in VGGFeatures(NAMES, "random")(torch.rand(1, 3, 32, 32)).values()]
    assert min(spreads) > 0.3
    assert max(spreads) < 6


@pytest.mark.parametrize("layers", [["conv6_1"], [], {"relu5_4": 1.0}])
def test_unknown_layers_are_rejected(layers: list[str]) -> None:
    with pytest.raises(UserError, match=r"perceptual.layers.*conv1_1"):
        VGGFeatures(layers, "random")


def test_local_files_are_read_in_both_formats(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    safetensors.torch.save_file(state, tmp_path / "vgg19.safetensors")
    digest = hashlib.sha256((tmp_path / "vgg19.safetensors").read_bytes()).hexdigest()
    a = VGGFeatures(["conv2_2"], str(weights))
    b = VGGFeatures(["conv2_2"], tmp_path / "vgg19.safetensors", sha256=digest)
    assert torch.equal(a.features[7].weight, b.features[7].weight)
    assert torch.equal(a.features[7].weight, state["features.7.weight"])


def test_a_file_with_another_sha256_is_rejected(weights: Path) -> None:
    with pytest.raises(UserError, match=f"{weights} has sha256 [0-9a-f]{{64}}, expected 0000"):
        find_weights(str(weights), "0" * 64)


def test_files_that_are_not_vgg19s_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    for content, message in [
        ({"features.0.weight": torch.zeros(64, 3, 3, 3)}, "features.0.bias is missing"),
        ({"features.0.weight": torch.zeros(8, 3, 3, 3)}, r"features.0.weight has shape \(8, 3, 3, 3\)"),
    ]:
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            VGGFeatures(["conv1_1"], path)
    path.write_text("<html>")
    with pytest.raises(UserError, match="not readable as weights"):
        VGGFeatures(["conv1_1"], path)
    torch.save(
        {"features.0.weight": torch.full((64, 3, 3, 3), torch.nan), "features.0.bias": torch.zeros(64)}, path
    )
    with pytest.raises(UserError, match=r"features.0.weight holds non-finite values"):
        VGGFeatures(["conv1_1"], path)
    with pytest.raises(UserError, match=r"perceptual.weights=.*gone.pth: no such file"):
        find_weights(tmp_path / "gone.pth")


def test_a_relative_path_becomes_absolute(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(weights.parent)
    assert find_weights(weights.name) == weights


def test_random_needs_no_file() -> None:
    assert find_weights("random") is None


def test_the_files_name_carries_its_sha256() -> None:
    assert module.imagenet_url() == "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
    assert module.sha256_start("vgg19-dcbb9e9d.pth") == "dcbb9e9d"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache; the local server is reached without a proxy."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets the content that a local server returns instead of the ImageNet weights, under a name with its sha256."""
    content = b""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def set_content(new: bytes, name: str | None = None) -> None:
        nonlocal content
        content = new
        name = name or f"vgg19-{hashlib.sha256(new).hexdigest()[:8]}.pth"
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        monkeypatch.setattr(module, "imagenet_url", lambda: url)

    yield set_content
    server.shutdown()
    server.server_close()


def test_missing_imagenet_weights_are_one_clear_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://127.0.0.1:9/vgg19-dcbb9e9d.pth"
    monkeypatch.setattr(module, "imagenet_url", lambda: url)
    for use in (lambda: find_weights("imagenet"), lambda: VGGFeatures(["conv5_4"], "imagenet")):
        with pytest.raises(UserError) as caught:
            use()
        line = str(caught.value)
        assert "\n" not in line
        for part in (
            str(cache / "vgg19-dcbb9e9d.pth"),
            url,
            "perceptual.weights=PATH",
            "=random",
        ):
            assert part in line
    assert list(cache.iterdir()) == []


def test_imagenet_weights_are_downloaded_once(cache: Path, serve: Callable[..., None], weights: Path) -> None:
    serve(weights.read_bytes())
    path = find_weights("imagenet")
    assert path is not None
    assert path.parent == cache
    serve(b"gone", path.name)
    assert VGGFeatures(["conv1_1"], "imagenet").features[0].weight.shape == (64, 3, 3, 3)
    assert list(cache.iterdir()) == [path]


def test_a_wrong_download_is_rejected_and_not_kept(cache: Path, serve: Callable[..., None]) -> None:
    serve(b"<html>Please log in</html>", "vgg19-dcbb9e9d.pth")
    with pytest.raises(UserError, match=r"cannot be downloaded \(invalid hash value.*dcbb9e9d"):
        find_weights("imagenet")
    assert list(cache.iterdir()) == []


def test_a_server_that_stops_answering_is_one_clear_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DOWNLOAD_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/vgg19-dcbb9e9d.pth"
        monkeypatch.setattr(module, "imagenet_url", lambda: url)
        with pytest.raises(UserError, match=r"cannot be downloaded .*timed out"):
            find_weights("imagenet")
    assert socket.getdefaulttimeout() is None
    assert list(cache.iterdir()) == []


def test_a_corrupt_file_in_the_cache_is_rejected(cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "vgg19-dcbb9e9d.pth").write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"vgg19-dcbb9e9d.pth has sha256 .* expected dcbb9e9d.*replace it"):
        find_weights("imagenet")
