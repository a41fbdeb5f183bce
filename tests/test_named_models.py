"""Models by name: how kinds are told apart, what each loader brings, and what it refuses."""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import ptq4vit_fx as ptq
from ptq4vit_fx.tools.named.kinds import kind_of, load_model
from ptq4vit_fx.tools.named.model import IMAGENET, Asked, crop_share

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
NET = """
import torch
from torch import nn
from beside import SIDE

class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.img_size = SIDE
        self.stem, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))

def make(**arguments):
    print("made")
    return Net(**arguments)

def broken():
    return Net(1 / 0)

def number():
    return 3

made = Net()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_kinds_are_told_by_their_form(here):
    kinds = {
        "timm": ["vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k", "hf-hub:timm/x", "local-dir:a/b"],
        "huggingface": ["google/vit-base", "./folder", "../a", "/x/y", "~/x", ".", "facebook/dinov2-small@main"],
        "torchvision": ["torchvision:vit_b_16"],
        "python": ["net.py:Net", "a/b/net.py:make", "net.py", "package.module:function", "net.py:Outer.make"],
    }
    for kind, names in kinds.items():
        assert {name: kind_of(name) for name in names} == dict.fromkeys(names, kind)
    (here / "vit_tiny_patch16_224").mkdir()
    assert kind_of("vit_tiny_patch16_224") == "timm"
    assert kind_of("./vit_tiny_patch16_224") == "huggingface"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.onnx", "got an ONNX file; pass the PyTorch model that it was exported from"),
        ("a/last.pth", "got a file of weights; pass the model's name, and --weights a/last.pth"),
        ("model.safetensors.index.json", "and --weights model.safetensors.index.json"),
        ("torch-vision:vit_b_16", "did you mean torchvision:vit_b_16?"),
        ("hf_hub:timm/x", "did you mean hf-hub:timm/x?"),
        ("torchvision:vit_b16", "did you mean torchvision:vit_b_16"),
        ("torchvision:", "did you mean torchvision:"),
        ("vit_tinny_patch16_224", "did you mean vit_tiny_patch16_224"),
        ("local-dir:nowhere", "got no such folder"),
        ("./nowhere", "got no such folder"),
        ("google/nothing", "download the folder and pass ./FOLDER"),
        ("a/b/c", "got no such folder"),
        ("no.py:Net", "no.py: expected a file of Python, got no such file"),
        ("no_such_module:make", "No module named 'no_such_module'"),
    ],
)
def test_names_of_nothing(here, name, says):
    with pytest.raises(ptq.PTQError) as refused:
        load_model(Asked(name))
    assert says in str(refused.value)


def timm_folder(folder, **more):
    torch.manual_seed(0)
    arguments = {"img_size": 32, "depth": 1, "num_classes": 3}
    network = timm.create_model("deit_tiny_patch16_224", **arguments).eval()
    config = {"num_classes": 3, "input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    whole = {"architecture": "deit_tiny_patch16_224", "pretrained_cfg": config, "model_args": arguments, **more}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(whole))
    save_file(network.state_dict(), folder / "model.safetensors")
    return network


def test_a_folder_of_timm(here):
    network = timm_folder(here / "mine", label_names=["a", "b", "c"], num_classes=3)
    for name in ("local-dir:mine", "./mine"):
        named = load_model(Asked(name))
        assert torch.equal(named.network(IMAGES), network(IMAGES))
        assert named.labels == ("a", "b", "c")
        assert tuple(named.preprocessing["mean"]) == (0.1, 0.2, 0.3)
        assert tuple(named.preprocessing["input_size"]) == (3, 32, 32)


class Runs:
    def __reduce__(self):
        return open, ("executed", "w")


def test_nothing_in_a_folder_runs(here):
    timm_folder(here / "mine", auto_map={"AutoModel": "evil.Model"})
    (here / "mine" / "evil.py").write_text("open('executed', 'w')")
    (here / "mine" / "model.safetensors").unlink()
    torch.save({"x": Runs()}, here / "mine" / "pytorch_model.bin")
    for name in ("local-dir:mine", "./mine"):
        with pytest.raises(ptq.PTQError, match=r"mine.*expected a state dict"):
            load_model(Asked(name))
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (here / "mine" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ptq.PTQError, match=r"\./mine: expected a configuration that transformers knows"):
        load_model(Asked("./mine"))
    with pytest.raises(
        ptq.PTQError, match=r"expected a folder that timm wrote, got one of Hugging Face; pass it as ./m"
    ):
        load_model(Asked("local-dir:mine"))
    assert not (here / "executed").exists()


def hf_folder(folder, kind="ViTForImageClassification", processor=None, shard="5GB", **arguments):
    import transformers

    torch.manual_seed(0)
    configuration = getattr(transformers, f"{kind.removesuffix('ForImageClassification').removesuffix('Model')}Config")
    network = getattr(transformers, kind)(configuration(**{**VIT, "intermediate_size": 64, **arguments})).eval()
    network.save_pretrained(folder, max_shard_size=shard)
    if processor is not None:
        processor.save_pretrained(folder)
    return network


@pytest.fixture
def processor():
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    return transformers.ViTImageProcessor(size={"height": 32, "width": 32})


def test_a_folder_of_transformers(here, processor):
    labels = {0: "cat", 1: "dog", 2: "owl"}
    network = hf_folder(here / "org" / "vit", processor=processor, shard="20KB", id2label=labels)
    assert len(list((here / "org" / "vit").glob("*.safetensors"))) > 1  # shards
    for name in ("./org/vit", "org/vit", str(here / "org" / "vit")):
        named = load_model(Asked(name))
        assert torch.equal(named.network(IMAGES).logits, network(IMAGES).logits)
    assert named.labels == ("cat", "dog", "owl")
    assert named.preprocessing["input_size"] == (3, 32, 32)
    assert named.preprocessing["mean"] == named.preprocessing["std"] == (0.5, 0.5, 0.5)
    assert (named.preprocessing["crop_mode"], named.preprocessing["interpolation"]) == ("squash", "bilinear")
    with pytest.raises(ptq.PTQError, match=r"--model-arg hiden_size: expected .* did you mean hidden_size"):
        load_model(Asked("./org/vit", arguments=("hiden_size=3",)))
    with pytest.raises(ptq.PTQError, match="expected a model of transformers with its weights"):
        load_model(Asked("./org/vit", arguments=("hidden_size=96",)))


def test_weights_of_transformers_in_every_spelling(here, processor):
    network = hf_folder(here / "vit", processor=processor, num_labels=3)
    (here / "other").mkdir()
    hf_folder(here / "other", processor=processor, num_labels=3, initializer_range=0.1)
    state = network.state_dict()
    torch.save(state, here / "own.pth")
    torch.save({"model": {f"module.{key}": x for key, x in state.items()}}, here / "module.pth")
    for weights in ("own.pth", "module.pth", "vit", "vit/model.safetensors"):
        named = load_model(Asked("./other", weights=here / weights))
        assert torch.equal(named.network(IMAGES).logits, network(IMAGES).logits), weights


def test_backbones_of_transformers(here, processor):
    network = hf_folder(here / "dino", "Dinov2Model", processor=processor)
    named = load_model(Asked("./dino"))
    assert torch.equal(named.network(IMAGES).pooler_output, network(IMAGES).pooler_output)
    assert named.labels is None
    import transformers

    hf_folder(here / "vit", processor=processor)
    config = json.loads((here / "vit" / "config.json").read_text())
    (here / "vit" / "config.json").write_text(json.dumps(config | {"architectures": ["ViTModel"]}))
    named = load_model(Asked("./vit"))  # saved with a head and without a pooler
    assert isinstance(named.network, transformers.ViTModel)
    assert named.network.pooler is None
    assert any("the pooler is left out" in line for line in named.said)
    (here / "vit" / "config.json").write_text(json.dumps(config | {"architectures": ["DeiTForImageClassification"]}))
    with pytest.raises(ptq.PTQError, match=r"./vit: expected"):
        load_model(Asked("./vit"))


def test_a_pickle_in_a_folder_of_transformers(here, processor):
    network = hf_folder(here / "dino", "Dinov2Model", processor=processor)
    state = network.state_dict()
    (here / "dino" / "model.safetensors").unlink()
    torch.save(state, here / "dino" / "pytorch_model.bin")
    assert torch.equal(load_model(Asked("./dino")).network(IMAGES).pooler_output, network(IMAGES).pooler_output)
    torch.save(state | {"x": Runs()}, here / "dino" / "pytorch_model.bin")
    with pytest.raises(ptq.PTQError, match="got a pickle that holds more than weights; save them as safetensors"):
        load_model(Asked("./dino"))
    assert not (here / "executed").exists()


def test_a_model_of_images_and_text_is_the_one_of_images(here):
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.CLIPConfig(
        vision_config={**VIT, "intermediate_size": 64}, text_config=text | {"vocab_size": 99, "eos_token_id": 98}
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(here / "clip")
    transformers.CLIPImageProcessor(size=32, crop_size=32).save_pretrained(here / "clip")
    named = load_model(Asked("./clip"))
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(IMAGES).pooler_output)
        assert torch.equal(named.network(IMAGES).image_embeds, expected)


PROCESSORS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": {"height": 32, "width": 32}},
    "DeiTImageProcessor": {"size": {"height": 48, "width": 48}, "crop_size": {"height": 32, "width": 32}},
    "CLIPImageProcessor": {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}, "resample": 2},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 32}},
    "BitImageProcessor": {"size": {"shortest_edge": 40}, "crop_size": 32, "do_normalize": False},
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_timm_prepares_images_as_the_processor_does(kind):
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    from timm.data import create_transform

    from ptq4vit_fx.tools.named.processor import preprocessing_of

    processor = getattr(transformers, kind)(**PROCESSORS[kind])
    rough = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 13, 3), np.uint8))
    picture = rough.resize((91, 63), Image.Resampling.BICUBIC)
    expected = torch.as_tensor(np.asarray(processor(picture)["pixel_values"][0]))
    found = create_transform(**preprocessing_of(processor.to_dict(), "x", 3))(picture)
    assert found.shape == expected.shape == (3, 32, 32)
    assert (found - expected).abs().mean() < 0.01 * expected.std()


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"do_flip_channel_order": True}, "blue, green, red"),
        ({"do_resize": False}, "any size"),
        ({"size": {"longest_edge": 32}}, "longest_edge"),
    ],
)
def test_what_no_file_records_is_refused(entry, says):
    from ptq4vit_fx.tools.named.processor import preprocessing_of

    with pytest.raises(ptq.PTQError, match=says):
        preprocessing_of({"size": {"height": 32, "width": 32}} | entry, "x", 3)


def test_rescaling_stands_in_mean_and_std():
    from ptq4vit_fx.tools.named.processor import preprocessing_of

    said = {"size": 32, "rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False}
    found = preprocessing_of(said, "x", 3)
    assert found["mean"] == pytest.approx((0.5,) * 3)
    assert found["std"] == pytest.approx((0.5,) * 3)
    bare = preprocessing_of({"size": 32, "do_rescale": False, "image_mean": 127.5, "image_std": 51.0}, "x", 1)
    assert (bare["mean"], bare["std"]) == (pytest.approx((0.5,)), pytest.approx((0.2,)))


def test_crops_are_of_the_size_that_was_resized():
    for side in range(8, 400, 7):
        for resized in range(side, 2 * side, 5):
            assert int(side / crop_share(side, resized)) == resized


def test_torchvision(here):
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v3_small(num_classes=3).eval()
    torch.save({"model": network.state_dict(), "args": {"a": 1}}, here / "w.pth")
    name = "torchvision:mobilenet_v3_small"
    named = load_model(Asked(name, weights=here / "w.pth", arguments=("num_classes=3",)))
    assert torch.equal(named.network(IMAGES), network(IMAGES))
    assert named.labels is None
    transforms = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT.transforms()
    found = named.preprocessing
    assert (found["mean"], found["std"]) == (tuple(transforms.mean), tuple(transforms.std))
    assert (found["interpolation"], found["crop_pct"], found["input_size"]) == ("bilinear", 224 / 256, (3, 224, 224))
    with pytest.raises(ptq.PTQError, match=r"expected one of IMAGENET1K_V1.*, got 'V1'"):
        load_model(Asked(name, arguments=("weights=V1",)))
    with pytest.raises(ptq.PTQError, match="expected a model with its weights, got "):
        load_model(Asked(name, arguments=("num_classes=three",), pretrained=False))


@pytest.fixture
def net(here):
    (here / "code").mkdir()
    (here / "code" / "net.py").write_text(NET)
    (here / "code" / "beside.py").write_text("SIDE = 32\n")
    (here / "code" / "bad.py").write_text("x = 1\ndef f(:\n    pass\n")
    (here / "code" / "leaves.py").write_text("\nimport sys\nsys.exit(3)\n")
    sys.modules.pop("beside", None)
    return here


def test_python_of_the_user(net, capsys):
    with pytest.warns(ptq.PTQWarning, match=r"taken is 32 x 32, ImageNet's; give the model a dict `pretrained_cfg`"):
        named = load_model(Asked("code/net.py:make", arguments=("classes=5",)))
    assert named.network(IMAGES).shape == (2, 5)
    assert not named.network.training
    assert named.preprocessing == IMAGENET | {"input_size": (3, 32, 32)}
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "made\n")
    torch.save({"state_dict": {f"net.{k}": x * 0 for k, x in named.network.state_dict().items()}}, net / "w.ckpt")
    with pytest.warns(ptq.PTQWarning):
        loaded = load_model(Asked("code/net.py:Net", weights=net / "w.ckpt", arguments=("classes=5",)))
    assert not loaded.network(IMAGES).any()
    assert loaded.said == ("weights: 'net.' is left out of its keys",)


def test_a_module_of_the_working_folder(net):
    (net / "mypackage").mkdir()
    (net / "mypackage" / "models.py").write_text("from torch import nn\ndef make():\n    return nn.Conv2d(1, 2, 3)\n")
    with pytest.warns(ptq.PTQWarning, match="224 x 224"):
        named = load_model(Asked("mypackage.models:make"))
    assert named.preprocessing["input_size"] == (1, 224, 224)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("code/net.py:broken", (), "got ZeroDivisionError: division by zero in net.py, line 20"),
        ("code/net.py:Nett", (), "did you mean Net"),
        ("code/net.py:number", (), "expected an nn.Module, got a int"),
        ("code/net.py:made", ("classes=3",), "expected a class or function with --model-arg, got a model"),
        ("code/net.py:SIDE", (), "expected what makes a model, got a int"),
        ("code/net.py:Net", ("clases=3",), "unexpected keyword argument 'clases'"),
        ("code/net.py", (), "write code/net.py:Net"),
        ("code/nett.py:Net", (), "did you mean code/net.py?"),
        ("code/bad.py:f", (), "in bad.py, line 2"),
        ("code/leaves.py:f", (), "SystemExit: 3 in leaves.py, line 3"),
    ],
)
def test_what_the_user_s_python_raises(net, name, arguments, says):
    with pytest.raises(ptq.PTQError) as refused:
        load_model(Asked(name, arguments=arguments))
    assert says in str(refused.value)
    assert str(refused.value).isprintable()


def test_without_transformers(here, processor, monkeypatch):
    hf_folder(here / "vit", processor=processor)
    find = __import__("importlib").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "transformers" else find(name, *a))
    with pytest.raises(ptq.PTQError, match=r"expected the package transformers, got none; pip install 'ptq4vit-fx\[hf"):
        load_model(Asked("./vit"))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "hf-hub:timm/vit_tiny", "google/vit-base-patch16-224"])
def test_without_a_connection_one_sentence_at_once(here, monkeypatch, capfd, name):
    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here))
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    started = time.monotonic()
    with pytest.raises(ptq.PTQError, match=r"got no connection to huggingface\.co, and none in its cache; connect"):
        load_model(Asked(name))
    assert time.monotonic() - started < 20  # its client tries for a minute
    assert "Retrying" not in "".join(capfd.readouterr())
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_what_is_on_this_disk_asks_for_no_address(here, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("asked for an address")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
    save_file(model.state_dict(), "w.safetensors")
    arguments = ("depth=1", "num_classes=3")
    found = load_model(Asked("vit_tiny_patch16_224", here / "w.safetensors", arguments=arguments)).network
    assert torch.equal(found.state_dict()["head.weight"], model.state_dict()["head.weight"])
    assert load_model(Asked("vit_tiny_patch16_224", arguments=arguments, pretrained=False)).network.num_classes == 3
