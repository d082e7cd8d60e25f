"""The config of a run: one frozen pydantic model, read from YAML. Unknown keys are errors."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

_MULTIPLES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_quantity(value: object) -> object:
    """``"32MB"``, ``"1GiB"`` or ``"80MP"`` as a number of bytes or pixels; numbers pass through."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMG]I?)?[BP]?\s*", value, re.IGNORECASE)
    if not match:
        raise ValueError(f"{value!r} is not a size; write it like 32MB, 80MP or 500000")
    return int(float(match[1]) * _MULTIPLES[(match[2] or "").upper()])


Quantity = Annotated[int, BeforeValidator(parse_quantity), Field(gt=0)]


class Section(BaseModel):
    """Base of all parts of the config."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    def identity(self) -> dict[str, Any]:
        """What a stage's fingerprint sees of a section that is one of its parameters."""
        return self.model_dump(mode="json")


# -- sources ----------------------------------------------------------------------------------------------------------


class UrlTable(Section):
    """Rows of a table: parquet, csv, tsv, json or jsonl, also .gz; a path, a glob or any fsspec URL."""

    kind: Literal["url_table"] = "url_table"
    path: str = Field(description="file, glob or URL; several files are read in the order of their names")
    url: str = Field("url", description="column with the image URL")
    text: str | None = Field("text", description="column with the alt text; null when there is none")
    boxes: str | None = Field(
        None,
        description="column with boxes: a list of objects with label, x1, y1, x2, y2 (and score) in pixels of the "
        "image; JSON in text files",
    )
    format: Literal["auto", "parquet", "csv", "tsv", "json", "jsonl"] = Field(
        "auto", description="by the file's ending"
    )


class ImageFolder(Section):
    """A folder of image files, with COCO caption and instance files or with a .txt beside each image."""

    kind: Literal["image_folder"] = "image_folder"
    path: str
    captions: str | None = Field(
        None, description="COCO captions JSON; null: key.txt beside each image, if there is one"
    )
    instances: str | None = Field(None, description="COCO instances JSON; its boxes become the column boxes")


class WebDataset(Section):
    """WebDataset shards: img2dataset's output or any tar files with an image, a text and perhaps a JSON a sample."""

    kind: Literal["webdataset"] = "webdataset"
    path: str = Field(description="tar file, glob or folder")
    image: str = Field("jpg;jpeg;png;webp", description="endings of the image member, first that is there")
    text: str = Field("txt;caption", description="endings of the text member, or the JSON key given by `text_key`")
    text_key: str | None = Field(None, description="take the text from this key of the JSON member instead")


class Img2DatasetParquet(Section):
    """What img2dataset wrote with output_format=parquet."""

    kind: Literal["img2dataset_parquet"] = "img2dataset_parquet"
    path: str = Field(description="parquet file, glob or folder")


Source = Annotated[UrlTable | ImageFolder | WebDataset | Img2DatasetParquet, Field(discriminator="kind")]


# -- download ---------------------------------------------------------------------------------------------------------


class Resize(Section):
    """How images are resized before they are stored: img2dataset's modes."""

    mode: Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"] = Field(
        "keep_ratio",
        description="keep_ratio: shorter side becomes size; keep_ratio_largest: longer side becomes size; center_crop: "
        "shorter side, then the central square; border: longer side, then padded with white to a square; no: as it is",
    )
    size: int = Field(512, gt=0, description="pixels")
    only_if_bigger: bool = Field(True, description="never enlarge")
    quality: int = Field(95, ge=1, le=100, description="JPEG quality of re-encoded images")


class Download(Section):
    """How images are fetched."""

    with_: Literal["pairmill", "img2dataset"] = Field("pairmill", alias="with", description="which downloader")
    concurrency: int = Field(256, gt=0, description="open requests a worker")
    per_host: int = Field(8, gt=0, description="open requests a host")
    timeout_s: float = Field(10, gt=0, description="total deadline of one attempt: connect, headers and body")
    retries: int = Field(2, ge=0, description="further attempts within one run, after errors that may pass")
    max_bytes: Quantity = Field(32_000_000, description="larger files are refused")
    max_pixels: Quantity = Field(
        80_000_000, description="larger images are refused, from their header, before decoding"
    )
    max_redirects: int = Field(5, ge=0)
    resize: Resize = Resize()
    robots: bool = Field(True, description="honour opt-out headers (X-Robots-Tag, tdm-reservation)")
    allow_private_addresses: bool = Field(False, description="loopback and private networks; for tests and intranets")
    user_agent: str = Field("pairmill/0.1", description="names the product; add a contact of yours")


# -- models -----------------------------------------------------------------------------------------------------------


class ModelChoice(Section):
    """A model by name and pretrained tag, or by folder. The word ``tiny`` alone means the shipped model."""

    name: str | None = Field(None, description="model name, such as ViT-L-14")
    pretrained: str | None = Field(None, description="pretrained tag, such as datacomp_xl_s13b_b90k")
    revision: str | None = Field(None, description="pinned revision of a hub model")
    path: str | None = Field(
        None, description="folder in the model's own format, local or a URL such as s3://bucket/folder"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        if isinstance(value, str):
            name, _, revision = value.partition("@")
            return {"name": name, **({"revision": revision} if revision else {})}
        return value

    @model_validator(mode="after")
    def _one_of(self) -> ModelChoice:
        if (self.name is None) == (self.path is None):
            raise ValueError("give either name (and pretrained) or path, or the word tiny")
        return self


class CaptionerChoice(ModelChoice):
    """A captioner: a transformers checkpoint by name and revision or by folder, the word ``tiny``, or, with
    ``base_url``, the name of a model behind an OpenAI-compatible endpoint."""

    base_url: str | None = Field(None, description="OpenAI-compatible endpoint, up to and with /v1")
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the endpoint's key")


class ItmChoice(ModelChoice):
    """A model with an image-text matching head: a transformers checkpoint, as of `CaptionerChoice`."""

    enc_token: bool | None = Field(
        None,
        description="BLIP: a text begins with [ENC], as in training (true), or with [CLS], as transformers' own "
        "processor has it (false); null: [ENC] where the model has one",
    )


class HeadChoice(Section):
    """A linear or MLP head over stored CLIP embeddings (aesthetic, NSFW, watermark ...), in safetensors."""

    path: str = Field(description="safetensors file, or a folder with one; local or a URL")
    activation: Literal["none", "sigmoid", "softmax"] | None = Field(
        None, description="applied to its output; null: as the file's metadata says, else none"
    )
    output: int = Field(0, ge=0, description="which output is the score, of a head with several")


def parse_batch(value: Any) -> Any:
    """A number of rows, or the word auto; told as one error where it is neither."""
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError("expected auto or a number greater than 0")


BatchSize = Annotated[int | Literal["auto"], BeforeValidator(parse_batch)]


class Models(Section):
    """Which models the stages use."""

    clip: ModelChoice = ModelChoice(name="tiny")
    captioner: CaptionerChoice = CaptionerChoice(name="tiny")
    itm: ItmChoice = ItmChoice(name="tiny")
    heads: dict[str, HeadChoice] = Field(
        default_factory=dict, description="score column by name: a head over the CLIP embedding of the image"
    )
    detector: ModelChoice | None = Field(
        None, description="open-vocabulary detector: an OWLv2 or Grounding DINO checkpoint; null: none"
    )
    segmenter: ModelChoice | None = Field(
        None, description="a SAM checkpoint that makes a mask of each box; null: none"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the model's arithmetic")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch: BatchSize = Field(
        "auto",
        description="rows a forward pass; auto: on a GPU as its memory allows. On a CPU it is the most that a pass has",
    )


# -- conditions -------------------------------------------------------------------------------------------------------

Condition = Annotated[
    str,
    Field(pattern=r"^\s*((>=|<=|>|<)\s*-?[0-9.]+|(top|bottom)\s+[0-9.]+\s*%)\s*$"),
]
"""``>= 0.28``, ``< 3``, or, over all live rows, ``top 30%``."""


# -- captions ---------------------------------------------------------------------------------------------------------


class Endpoint(Section):
    """How an OpenAI-compatible endpoint is called."""

    concurrency: int = Field(8, gt=0, description="open requests a worker")
    timeout_s: float = Field(60, gt=0, description="total deadline of one request")
    retries: int = Field(4, ge=0, description="further attempts within one run, with growing pauses")
    max_retry_wait_s: float = Field(30, ge=0, description="longest pause; a Retry-After above it defers the pair")
    image_side: int = Field(768, gt=0, description="longer side of the image that is sent, pixels")
    max_tokens: int = Field(300, gt=0, description="of an answer")


class Caption(Section):
    """How captions are written. Lengths are in tokens, those of the prompt included, as in BLIP."""

    count: int = Field(1, gt=0, description="captions an image")
    method: Literal["nucleus", "beam", "greedy"] = "nucleus"
    top_p: float = Field(0.9, gt=0, le=1, description="nucleus: probability mass that is sampled from")
    temperature: float = Field(1.0, gt=0, description="nucleus: divides the logits")
    beams: int = Field(3, gt=0, description="beam: width; at least count")
    repetition_penalty: float = Field(1.1, gt=0)
    max_length: int = Field(20, gt=0)
    min_length: int = Field(5, ge=0)
    prompt: str | None = Field(
        "a picture of ", description="what a caption goes on from; BLIP's is stripped from it. null: none"
    )
    endpoint: Endpoint = Endpoint()


class Mix(Section):
    """Which of a pair's texts are kept: see `captioners.mixing`. Changing it runs no model."""

    recipe: Literal["capfilt", "blip2", "nguyen23", "laion_coco", "recap", "web_only", "synthetic_only"] = "capfilt"
    clip: Condition | None = Field(
        None,
        description="a text stays when its CLIP score is so; nguyen23 needs one, and takes top 30% where this is null",
    )
    top: int | None = Field(None, gt=0, description="texts kept at most; null: as the recipe was published")


# -- boxes ------------------------------------------------------------------------------------------------------------


class Boxes(Section):
    """Which boxes of a pair are kept: those that came with it, and those of ``models.detector``."""

    min_side: float = Field(4.0, ge=0, description="pixels of the stored image; a smaller box is rejected")
    threshold: float = Field(0.3, ge=0, le=1, description="detector: least score of a box")
    text_threshold: float = Field(0.25, ge=0, le=1, description="Grounding DINO: least score of a word for a box")
    overlap: float = Field(
        0.7, gt=0, le=1, description="intersection over union from which two boxes of a label are one"
    )
    most: int = Field(50, gt=0, description="detector: boxes an image at most, the best ones")
    labels: tuple[str, ...] = Field(
        (),
        description="labels that were looked for in every image: what has no box is not there, and questions may say "
        "so. With a detector, also what it looks for, besides the nouns of the texts",
    )


# -- instruction data -------------------------------------------------------------------------------------------------

InstructKind = Literal["conversation", "detail", "complex", "grounding"]


class InstructWriter(Section):
    """Who writes conversations."""

    kind: Literal["offline", "endpoint", "batch"] = Field(
        "offline",
        description="offline: composed from texts and boxes, by no model; endpoint: an OpenAI-compatible one; batch: "
        "the Batch-file API of one",
    )
    name: str | None = Field(None, description="endpoint, batch: the model's name there")
    revision: str | None = Field(None, description="part of its identity, not sent")
    base_url: str | None = Field(None, description="endpoint, batch: up to and with /v1")
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the endpoint's key")
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(1000, gt=0, description="of an answer")
    answers: int = Field(2, gt=0, description="answers asked for, until one passes the checks")
    concurrency: int = Field(200, gt=0, description="open requests of the whole run")
    requests_per_minute: int | None = Field(None, gt=0, description="of the whole run; null: no limit")
    tokens_per_minute: int | None = Field(None, gt=0, description="prompt and answer, of the whole run")
    timeout_s: float = Field(120, gt=0, description="total deadline of one request")
    retries: int = Field(4, ge=0, description="further attempts at an answer within one run, with growing pauses")
    max_retry_wait_s: float = Field(60, ge=0, description="longest pause; a Retry-After above it defers")
    batch_requests: int = Field(50_000, gt=0, description="batch: requests a file at most")


class Price(Section):
    """What a million tokens cost, in any currency."""

    prompt: float = Field(0.0, ge=0)
    completion: float = Field(0.0, ge=0)


class Budget(Section):
    """What a dataset's instruction data may cost, all runs together; null: no limit."""

    tokens: int | None = Field(None, gt=0, description="prompt and answer tokens")
    money: float | None = Field(None, gt=0, description="in the currency of price")


class Instruct(Section):
    """Which conversations are written of a kept pair, and by whom."""

    kinds: dict[InstructKind, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict,
        description="share of the images, by kind: {conversation: 1.0, detail: 0.4, complex: 1.0, grounding: 0.5}; "
        "empty: none are written",
    )
    writer: InstructWriter = InstructWriter()
    price: Price = Price()
    budget: Budget = Budget()
    max_texts: int = Field(5, gt=0, description="kept texts that the writer is told, by rank")
    max_boxes: int = Field(30, gt=0, description="boxes that it is told, largest first")


# -- keep -------------------------------------------------------------------------------------------------------------


class Keep(BaseModel):
    """Which pairs stay. A rule set to null is off. Further keys are conditions on any score column of the recipe."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Condition]

    min_words: int | None = Field(3, ge=0)
    max_words: int | None = Field(None, gt=0)
    min_chars: int | None = Field(6, ge=0)
    max_chars: int | None = Field(1000, gt=0)
    max_repetition: float | None = Field(0.6, ge=0, le=1, description="share of the text that repeats itself")
    boilerplate: bool = Field(False, description="true keeps texts such as file names and 'image of'")
    language: tuple[str, ...] | None = Field(("en",), description="ISO 639-1 codes; null: any")
    min_language_score: float = Field(
        0.5, ge=0, le=1, description="another language counts from this probability on; texts of unsure language stay"
    )
    min_side: int | None = Field(200, gt=0, description="shorter side of the original, pixels")
    max_aspect: float | None = Field(3.0, ge=1, description="longer side over shorter side")
    min_contrast: float | None = Field(2.0, ge=0, description="standard deviation of grey levels; below: blank")
    clip_score: Condition | None = ">= 0.28"
    itm: Condition | None = Field(
        ">= 0.5", description="where texts are mixed: a text stays when its ITM probability is so; null: not asked"
    )


class Dedup(Section):
    """Which duplicates are dropped; null or false switches a kind off."""

    exact: bool = Field(True, description="same bytes, or same decoded pixels")
    semantic: float | None = Field(
        0.95, gt=0, le=1, description="cosine of CLIP image embeddings from which two are one"
    )
    max_colour_distance: float | None = Field(
        None,
        ge=0,
        le=1,
        description="semantic duplicates must also look alike: root mean square difference of 4 x 4 colour layouts "
        "(0 to 1, the mirrored one counts too); null: the cosine alone decides, as in SemDeDup",
    )
    floor: float = Field(
        0.80, gt=0, le=1, description="neighbours above this cosine are stored, so `semantic` can move"
    )
    neighbours: int = Field(32, gt=0, description="neighbours stored for a row")
    cells: int | None = Field(None, gt=0, description="k-means cells; null: by size, 1 below 20,000 rows")
    probe: int = Field(4, gt=0, description="cells searched for a row: its own and the next nearest ones")


# -- engine -----------------------------------------------------------------------------------------------------------


class Placement(Section):
    """What each worker of a stage occupies, where it may be, and how many of them there are. What is not said stays as
    the stage has it. Never part of a stage's identity."""

    cpus: float | None = Field(None, ge=0, description="CPUs a worker")
    gpus: float | None = Field(None, ge=0, description="GPUs a worker; a fraction shares one among workers")
    memory: Quantity | None = Field(None, description="main memory a worker, as the cluster books it")
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Ray: custom resources a worker, such as {fetcher: 1}"
    )
    labels: dict[str, str] = Field(
        default_factory=dict, description="Ray: labels of the nodes that it may run on, such as {pool: gpu}"
    )
    min_workers: int | None = Field(None, gt=0, description="Ray: workers of a stage that keeps them, at least")
    max_workers: int | None = Field(None, gt=0, description="Ray: and at most; null: as many as fit")

    @model_validator(mode="after")
    def _in_order(self) -> Placement:
        if self.min_workers and self.max_workers and self.min_workers > self.max_workers:
            raise ValueError(f"min_workers ({self.min_workers}) is above max_workers ({self.max_workers})")
        return self

    @field_validator("gpus")
    @classmethod
    def _whole(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus % 1:
            raise ValueError(f"{gpus:g} is neither a part of one GPU nor a whole number of them")
        return gpus

    @field_validator("resources")
    @classmethod
    def _custom(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, key in {"CPU": "cpus", "GPU": "gpus", "memory": "memory"}.items():
            if name in resources:
                raise ValueError(f"{name} is no custom resource; say {key}: {resources[name]:g}")
        return resources


class Engine(Section):
    """Where the stages run."""

    kind: Literal["local", "ray", "beam"] = Field(
        "ray", description="beam: see `python beam_runner.py --help`, which sets it"
    )
    address: str | None = Field(
        "auto", description="Ray: a cluster's address; auto: RAY_ADDRESS, a running one, or a new one"
    )
    workers: int | None = Field(
        None,
        gt=0,
        description="local: processes (default 1); ray: model workers at most; Dask on this machine: processes",
    )
    stages: dict[str, Placement] = Field(
        default_factory=dict, description="what workers occupy and where they run, by stage: {clip: {gpus: 0.5}}"
    )
    wait_s: float = Field(
        600, ge=0, description="Ray: how long a run waits for nodes that it needs and the cluster lacks, or has lost"
    )
    runtime_env: dict[str, Any] = Field(
        default_factory=dict, description="Ray: runtime environment of the workers: working_dir, pip, env_vars ..."
    )
    pipeline_options: tuple[str, ...] = Field(
        (), description="Beam: its pipeline options, which `python beam_runner.py` takes from its command line"
    )


class Errors(Section):
    """The error budget: how many rows a stage may quarantine before the run stops."""

    max_fraction: float = Field(0.02, ge=0, le=1)
    min_rows: int = Field(20, ge=0)


class Retry(Section):
    """When a refresh tries deferred pairs again: after `first_s`, then twice as long, and so on."""

    first_s: float = Field(3600, ge=0, description="seconds from the first attempt to the next")
    longest_s: float = Field(
        604_800, ge=0, description="no wait is longer, unless a server's Retry-After asks for it, up to 30 days"
    )
    attempts: int = Field(10, gt=0, description="then only `pairmill run --retry-deferred` tries the pair again")


class Retention(Section):
    """Which snapshots `pairmill vacuum` leaves: the newest ones and the young ones, and always the last one; all where
    both are null. A run removes none."""

    snapshots: int | None = Field(None, gt=0, description="so many of the newest ones; null: see days")
    days: float | None = Field(None, ge=0, description="those that are younger; null: age does not count")


# -- the whole --------------------------------------------------------------------------------------------------------


class RunConfig(Section):
    """All knobs of a run. See docs/config.md for an example of each."""

    dataset: str = Field(description="a path, or s3://... or gs://...")
    recipe: str = Field("clip_filter", description="a name in pipelines/, or module:function")
    source: tuple[Source, ...] = Field(min_length=1)
    shard_size: int = Field(1000, gt=0, description="pairs a shard; fixed by the first refresh of a dataset")
    download: Download = Download()
    models: Models = Models()
    caption: Caption = Caption()
    mix: Mix = Mix()
    boxes: Boxes = Boxes()
    instruct: Instruct = Instruct()
    keep: Keep = Keep()
    dedup: Dedup = Dedup()
    engine: Engine = Engine()
    errors: Errors = Errors()
    retry: Retry = Retry()
    retention: Retention = Retention()
    seed: int = 0
    options: dict[str, Any] = Field(default_factory=dict, description="for recipes of your own")

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("source"), dict):
            return {**value, "source": [value["source"]]}
        return value
