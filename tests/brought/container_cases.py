"""What people hand in as example and as data: containers, dtypes, shapes, loaders."""

from __future__ import annotations

import itertools
from collections import OrderedDict, UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ptq4vit_fx as ptq
from brought import brought
from brought.pipeline import QUICK, pictures, pipeline, vit


class Tagged(nn.Module):
    """A ViT whose logits also depend on a number per image, and, if it is given, on labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = vit(num_classes=48)
        self.kind, self.head = nn.Embedding(5, 48), nn.Linear(48, 7)

    def forward(self, image: Tensor, kind: Tensor | None = None, labels: Tensor | None = None) -> Any:
        features = self.net(image)
        logits = self.head(F.gelu(features if kind is None else features + self.kind(kind)))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Encoder(nn.Module):
    """Tokens of any kind, made by `embed`, through one attention layer and a head."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm = embed, nn.LayerNorm(48)
        self.block = nn.TransformerEncoderLayer(48, 3, 96, activation="gelu", batch_first=True)
        self.head = nn.Linear(48, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x.flatten(2).transpose(1, 2) if x.ndim > 3 else x
        return self.head(self.block(self.norm(x)).mean(1))


def tagged() -> nn.Module:
    torch.manual_seed(0)
    return Tagged().eval()


def encoder(embed: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Encoder(embed).eval()


KINDS = torch.tensor([0, 1, 2, 3, 4, 0])


def calibrated(data: Any, model: nn.Module | None = None, **arguments: Any) -> ptq.Calibration:
    """Return the calibration of a ViT on data that is not in order, in the end."""
    prepared = ptq.prepare_fx(model or vit(), QUICK, pictures(1))
    return ptq.calibrate(prepared, data, progress=False, **arguments)


def assert_same(data: Any, count: int = 6, **arguments: Any) -> None:
    """Assert that data gives the scales that the images in one tensor give."""
    assert calibrated(data, **arguments).fingerprint() == calibrated(pictures()[:count]).fingerprint()


@brought("input", "a processor's output (BatchFeature), a mapping of one tensor", quick=True)
def processor_output() -> None:
    images = UserDict({"image": pictures()})
    pipeline(tagged(), pictures(), example=UserDict({"image": pictures(1), "kind": None}), data=images)


@brought("input", "a mapping of image and number, not in the order of forward", quick=True)
def mapping_of_two() -> None:
    example = OrderedDict(kind=KINDS[:1], image=pictures(1))
    rows = zip(KINDS.split(4), pictures().split(4), strict=True)
    data = [{"label": 3, "kind": kinds, "image": images} for kinds, images in rows]
    pipeline(tagged(), (pictures(), KINDS), example=example, data=data)


@brought("input", "a mapping with labels that forward could take")
def mapping_with_labels() -> None:
    data = [{"image": images, "labels": torch.zeros(3).long()} for images in pictures().split(3)]
    pipeline(tagged(), pictures(), example=data[0], data=data)
    converted = ptq.quantize(tagged(), data, qconfig_mapping=QUICK, progress=False)
    assert converted(pictures()).shape == (6, 7)


@brought("input", "a mapping with a name that forward has not", refused="image, kind, labels, got pixels; name")
def mapping_of_unknown_name() -> None:
    ptq.prepare_fx(tagged(), QUICK, {"pixels": pictures(1)})


@brought("data", "batches that lack an input", refused="for every input of the model: x, got image, label; name the")
def batches_of_other_names() -> None:
    calibrated([{"image": pictures(), "label": KINDS}])


@brought("input", "an image and one integer per image", quick=True)
def image_and_integer() -> None:
    pipeline(tagged(), (pictures(), KINDS))


@brought("input", "the first batch of a loader, with its labels")
def example_with_labels() -> None:
    loader = DataLoader(TensorDataset(pictures(), KINDS), batch_size=4)
    pipeline(vit(), pictures(), example=next(iter(loader)), data=loader)


@brought("input", "arrays of NumPy in double precision")
def numpy_arrays() -> None:
    double = pictures().double().numpy()
    pipeline(vit(), pictures(), example=double[:1], data=double)
    assert_same([double[:4], double[4:]])


@brought("input", "half, bfloat16 and double images", quick=True)
def other_floats() -> None:
    rounded = pictures().half().float()
    for example in (rounded[:1].half(), rounded[:1].double()):
        prepared = ptq.prepare_fx(vit(), QUICK, example)
        ptq.calibrate(prepared, [rounded[:2].half(), rounded[2:4].double(), rounded[4:]], progress=False)
    ptq.prepare_fx(vit(), QUICK, rounded[:1].bfloat16())
    pipeline(vit(), rounded, example=rounded[:1].half(), data=rounded.double())


@brought("input", "images made in inference mode, and images that require gradients")
def inference_tensors() -> None:
    with torch.inference_mode():
        images = pictures()
    pipeline(vit(), pictures(), example=images[:1], data=images)
    assert_same(pictures().requires_grad_())


@brought("input", "a spectrogram (batch, bands, time)", quick=True)
def spectrogram() -> None:
    images = pictures(6, 40, 12)
    pipeline(encoder(nn.Sequential(nn.Conv1d(40, 48, 3, 2), nn.Flatten(2), Transposed())), images)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@brought("input", "a video (batch, channels, frames, height, width)", quick=True)
def video() -> None:
    pipeline(encoder(nn.Conv3d(3, 48, (2, 8, 8), (2, 8, 8))), pictures(6, 3, 4, 16, 16))


@brought("input", "token numbers (batch, length) alone", quick=True)
def tokens() -> None:
    ids = torch.randint(0, 50, (6, 12), generator=torch.Generator().manual_seed(0))
    pipeline(encoder(nn.Embedding(50, 48)), ids)
    prepared = ptq.prepare_fx(encoder(nn.Embedding(50, 48)), QUICK, ids)
    ptq.calibrate(prepared, ids.int(), progress=False)


@brought("input", "features (batch, width)")
def features() -> None:
    net = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 7)).eval()
    pipeline(net, pictures(6, 24))


@brought("input", "an image without a batch", refused="got (3, 32, 32); add the batch dimension: x[None]", quick=True)
def no_batch() -> None:
    ptq.prepare_fx(vit(), QUICK, pictures()[0])


@brought("data", "an image without a batch as data", refused="got (3, 32, 32); add the batch dimension: x[None]")
def no_batch_in_data() -> None:
    calibrated(pictures()[0])


@brought("data", "a data set without a loader", refused="got 1 single image of shape (3, 32, 32); read a data set thr")
def data_set_without_loader() -> None:
    calibrated(TensorDataset(pictures(), KINDS))


@brought("data", "a list of single images", refused="got 3 single images of shape (3, 32, 32); put them together: t")
def list_of_single_images() -> None:
    calibrated([list(pictures(3))])


@brought("data", "channels last", refused="got (6, 32, 32, 3); put the channels first: x.permute(0, 3, 1, 2)")
def channels_last() -> None:
    calibrated(pictures().permute(0, 2, 3, 1))


@brought("input", "an example without images", refused="expected one image or more, got shape (0, 3, 32, 32)")
def no_images_in_example() -> None:
    ptq.prepare_fx(vit(), QUICK, pictures()[:0])


@brought(
    "input", "None as example", refused="example_inputs: expected a tensor whose first dimension is the batch, got No"
)
def none_as_example() -> None:
    ptq.prepare_fx(vit(), QUICK, None)


@brought("input", "a scalar as example", refused="got a scalar; give it the batch as first dimension")
def scalar_as_example() -> None:
    ptq.prepare_fx(vit(), QUICK, torch.tensor(1.0))


@brought("input", "an image of pillow as example", refused="got an image of pillow; preprocess it")
def pillow_as_example() -> None:
    ptq.prepare_fx(vit(), QUICK, Image.new("RGB", (32, 32)))


@brought(
    "data", "a path that leads nowhere", refused="read images: photos: expected a folder of images, got no such fo"
)
def path_as_data() -> None:
    calibrated("photos/")


@brought(
    "data", "None as data", refused="calibrate: data: expected a tensor whose first dimension is the batch, got None"
)
def none_as_data() -> None:
    calibrated(None)


@brought(
    "data", "8-bit images for a model that was prepared on floats", refused="as in the example, got torch.uint8; prep"
)
def bytes_as_data() -> None:
    calibrated((pictures() * 50).byte())


@brought("input", "8-bit images, normalized in forward", quick=True)
def bytes_all_the_way() -> None:
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pipeline(Normalized().eval(), images)


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = vit()

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x.float() / 255 - 0.5) * 4)


@brought("input", "a nested tensor", refused="got a nested tensor; pad it")
def nested_tensor() -> None:
    calibrated([torch.nested.nested_tensor(list(pictures(2)), layout=torch.jagged)])


@brought("input", "a sparse tensor", refused="got a tensor of layout torch.sparse_coo; pass x.to_dense()")
def sparse_tensor() -> None:
    calibrated([pictures().to_sparse()])


@brought("input", "complex numbers", refused="got torch.complex64; pass real and imaginary part as channels")
def complex_numbers() -> None:
    calibrated([pictures().to(torch.complex64)])


@brought("data", "a loader that never ends", quick=True)
def endless_loader() -> None:
    images = pictures()
    assert_same(itertools.repeat(images), images=6)
    assert_same(itertools.repeat(images[:4]), count=4, images=4)
    ptq.quantize(vit(), (images for _ in itertools.count()), qconfig_mapping=QUICK, progress=False, images=6)


@brought("data", "a generator that was used before", refused="got none; an iterator can be read once", quick=True)
def used_generator() -> None:
    batches = iter([pictures()])
    assert_same(batches)
    calibrated(batches)


@brought("data", "an empty list", refused="calibrate: data: expected one image or more, got none")
def empty_list() -> None:
    calibrated([])


@brought("data", "batches nested with their labels")
def nested_batches() -> None:
    images = pictures()
    assert_same([((images,), KINDS)])
    assert_same([({"x": images}, KINDS)])
    assert_same([[images]])
    assert_same({"x": images})
    assert_same({"x": part} for part in images.split(4))


@brought("data", "two inputs as one tuple of tensors")
def whole_tuple() -> None:
    pipeline(tagged(), (pictures(), KINDS), data=(pictures(), KINDS))
    ptq.quantize(Pair().eval(), [(pictures(), KINDS.float()[:, None])], qconfig_mapping=QUICK, progress=False)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.size = vit(), nn.Linear(1, 7)

    def forward(self, image: Tensor, size: Tensor) -> Tensor:
        return self.net(image) + self.size(size)


@brought(
    "data",
    "floats where the example had integers",
    refused="got torch.float32; pass x.to(torch.int64",
)
def floats_for_integers() -> None:
    prepared = ptq.prepare_fx(tagged(), QUICK, (pictures(1), KINDS[:1]))
    ptq.calibrate(prepared, [(pictures(), KINDS.float())], progress=False)


@brought(
    "data",
    "inputs of different batches",
    refused="batch 1: expected as many rows of every input, got 6 of image, 5 of kind",
)
def different_batches() -> None:
    prepared = ptq.prepare_fx(tagged(), QUICK, (pictures(1), KINDS[:1]))
    ptq.calibrate(prepared, [(pictures(), KINDS), (pictures(), KINDS[:5])], progress=False)


class Broken(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> Tensor:
        return pictures(1, 3, 32, 32 + number // 4)[0]


@brought(
    "data",
    "images of different sizes in a loader",
    refused="reading batch 1: expected a batch, got RuntimeError: stack",
)
def different_sizes() -> None:
    calibrated(DataLoader(Broken(), batch_size=3))


@brought(
    "data",
    "a stream whose third batch is of another size",
    refused="batch 2, input x: expected shape (batch, 3, 32, 32)",
)
def other_size_later() -> None:
    def stream() -> Iterator[Tensor]:
        yield from (pictures(), pictures(), pictures(2, 3, 40, 40))

    calibrated(stream())


@brought("data", "NaN in one image", refused="batch 1, image 2: expected finite pixels, got NaN")
def not_a_number() -> None:
    images = pictures()
    images[5, 0, 0, 0] = np.nan
    calibrated([images[:3], images[3:]])


@brought("input", "an empty tuple as example", refused="expected one image or more, got nothing; pass torch.randn")
def empty_example() -> None:
    ptq.prepare_fx(vit(), QUICK, ())


@brought("input", "a shape as example", refused="got a shape, (1, 3, 32, 32); pass a tensor of that shape: torch.randn")
def shape_as_example() -> None:
    ptq.prepare_fx(vit(), QUICK, (1, 3, 32, 32))


@brought("input", "a loader as example", refused="got DataLoader; pass one batch of it: next(iter(loader))")
def loader_as_example() -> None:
    ptq.prepare_fx(vit(), QUICK, DataLoader(TensorDataset(pictures()), batch_size=2))


@brought("input", "arguments by position and by name, and inputs beside labels")
def arguments_as_called() -> None:
    pipeline(tagged(), (pictures(), KINDS), example=(pictures(1), {"kind": KINDS[:1]}))
    pipeline(tagged(), (pictures(), KINDS), example=((pictures(1), KINDS[:1]), KINDS[:1]))
    pipeline(tagged(), pictures(), example=({"image": pictures(1)}, KINDS[:1]))


@brought("data", "text as the number of images", refused="images: expected an integer of 1 or more, got '3'")
def text_as_number() -> None:
    calibrated(pictures(), images="3")


@brought(
    "data", "single images with the channels last", refused="put the channels first and add the batch dimension: x.p"
)
def single_channels_last() -> None:
    calibrated([pictures()[0].permute(1, 2, 0)])


@brought("data", "batches with the targets of a detector")
def detector_targets() -> None:
    data = [{"image": pictures(), "labels": [{"boxes": torch.ones(1, 4)}] * 6}]
    ptq.quantize(tagged(), data, qconfig_mapping=QUICK, progress=False)


@brought("data", "an imaginary part, whose negative is a bit of the tensor: fft(x).conj().imag")
def negative_bit() -> None:
    negative = torch.view_as_complex(torch.stack([pictures(), -pictures()], -1)).conj().imag
    assert negative.is_neg()
    pipeline(vit(), pictures(), example=negative[:1], data=[negative[:4], negative[4:]])
