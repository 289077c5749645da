"""BDD100K and iVS-style folders as a tensorflow-datasets builder, written and read without TensorFlow.

    builder = prepare("/data/bdd100k", "/data/tfds")             # once
    train = StoredSamples(builder.as_data_source("train"))              # a sequence of `Sample`s

Importing this module registers `panoptic_driving`, so `tfds.data_source("panoptic_driving/bdd100k")`
works as well. The files lie in array_record, one file a shard, which makes random access fast on
disks that dislike a hundred thousand small files. Images keep their bytes, unless EXIF turns them;
masks have our values, riders are paired and lanes typed.
"""  # noqa: E501

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.extras import need
from qyolop_jax.formats import ReadError, is_turned
from qyolop_jax.readers import Bdd100k, TypedLanes
from qyolop_jax.samples import Report, Sample, SampleError, check_sample

tfds: Any = need("tensorflow_datasets", "eval", "this builder")

READERS = {"bdd100k": Bdd100k, "ivs": TypedLanes}
STORED_SPLITS = ("train", "val")


class PanopticDriving(tfds.core.GeneratorBasedBuilder):
    """Boxes, drivable area and typed lanes of driving images, from a folder that you have."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name="bdd100k", description="BDD100K, riders paired, lanes typed"),
        tfds.core.BuilderConfig(name="ivs", description="iVS-style typed masks"),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    Both sets need an account with their makers. Point manual_dir at a folder as
    qyolop_jax.readers.Bdd100k or TypedLanes reads it: images/100k/{train,val} and labels/... for
    BDD100K, images/, masks/ and det/ with {train,val} in each for iVS.
    """

    def __init__(self, **settings: Any):
        self.report = Report()
        """Counts what was skipped while the files were written."""
        super().__init__(**settings)

    def _info(self):
        mask = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
        features = dict(
            image=tfds.features.Image(shape=(None, None, 3)),
            boxes=tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
            classes=tfds.features.Tensor(shape=(None,), dtype=np.int32),
            crowd=tfds.features.Tensor(shape=(None,), dtype=np.bool_),
            area=mask,
            lane=mask,
            labelled=tfds.features.Tensor(shape=(3,), dtype=np.bool_),
            name=tfds.features.Text(),
        )
        return tfds.core.DatasetInfo(
            builder=self, description=__doc__, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        root = Path(dl_manager.manual_dir)
        make = READERS[self.builder_config.name]
        found, problems = {}, []
        for split in STORED_SPLITS:
            try:
                found[split] = make(root, split, report=self.report)
            except ReadError as error:
                problems.append(f"{split}: {error}")
        if not found:
            raise ReadError("; ".join(problems))
        return {split: self._generate_examples(reader) for split, reader in found.items()}

    def _generate_examples(self, reader):
        cv2 = need("cv2", "vision", "writing a data set")
        png = lambda mask: io.BytesIO(cv2.imencode(".png", mask)[1].tobytes())
        for i, path in enumerate(reader.images):
            try:
                s = reader[i]
            except (ReadError, SampleError) as error:
                self.report.count("broken sample left out", str(error))
                continue
            yield (
                path.name,
                dict(
                    image=s.image if is_turned(path) else str(path),
                    boxes=s.boxes,
                    classes=s.classes,
                    crowd=s.crowd,
                    area=png(s.area),
                    lane=png(s.lane),
                    labelled=np.array(s.labelled),
                    name=s.name,
                ),
            )


def prepare(
    manual_dir: str | Path, data_dir: str | Path, config: str = "bdd100k"
) -> PanopticDriving:
    """The builder of a data set; writes its files under `data_dir` if they are not there yet.

    ReadError if the folder is not as expected; `builder.report` counts what was left out.
    """
    if config not in READERS:
        raise ReadError(f"no set {config!r}; there are {', '.join(READERS)}")
    if not Path(manual_dir).is_dir():
        raise ReadError(f"there is no folder {manual_dir}")
    builder = PanopticDriving(config=config, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(manual_dir))
    )
    return builder


class StoredSamples(Sequence):
    """The `Sample`s in a data source of `PanopticDriving`."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        stored = self.source[index]
        text = stored["name"]
        return check_sample(
            Sample(
                np.asarray(stored["image"]),
                np.asarray(stored["boxes"], np.float32).reshape(-1, 4),
                np.asarray(stored["classes"], np.int32).reshape(-1),
                np.asarray(stored["crowd"], bool).reshape(-1),
                np.asarray(stored["area"])[..., 0],
                np.asarray(stored["lane"])[..., 0],
                tuple(bool(b) for b in stored["labelled"]),
                text.decode() if isinstance(text, bytes) else str(text),
            )
        )
