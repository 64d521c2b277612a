"""The row of the table without a network: the pixel classifier of ``stages/forest.py``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from imaging.drawing import save_prediction
from imaging.store import fingerprint
from report.results import FIT, write_results
from stages.finetuning import picture_name
from stages.forest import PixelForest, forest_settings, pixels_of
from stages.job import FILES
from stages.scored import Scored
from utils.log import RunLog, evaluation_lines
from utils.metrics import Counts, Scores, SegmentationScores
from utils.run_folder import locked
from utils.training import ANEW

LEARNT = "learnt test images"  # among settings; an older version scored forests on them, too


class ForestRun(Scored):
    """A run of the pixel classifier in a run folder: trained and evaluated once."""

    stage, number = "forest", 4

    def outputs(self) -> list[str]:
        """Its log and its predictions."""
        return ["log_forest.txt", *(f"epoch_0/{picture_name(s.name)}" for s in self.tested)]

    def decisive_settings(self) -> dict[str, Any]:
        """The settings that it uses, its own, and a fingerprint of the files.

        Also test images whose labels are learnt, which it was once scored on.
        """
        names = ("num_classes", "ignore_label", "image_size", "standardize", "seed", "mapping")
        settings = {name: self.config.to_dict()[name] for name in names} | forest_settings()
        if self.learnt:
            settings[LEARNT] = [self.test[number].name for number in self.learnt]
        return {**settings, FILES: fingerprint(self.samples(), self.job.store)}

    def new_length(self, state: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
        """Anew, which takes seconds, if it was scored on test images whose labels it learnt."""
        older = LEARNT in settings and LEARNT not in state["settings"]
        return ANEW if older and len(self.differences(state["settings"], settings)) == 1 else ""

    def taught(self) -> tuple[PixelForest, int]:
        """A forest trained on the annotated images, and the number of pixels it learnt from."""
        c, store, samples = self.config, self.job.store, self.annotated
        forest = PixelForest(c.seed, c.standardize, torch.get_num_threads())
        images, insides = zip(*(pixels_of(store, s.image) for s in samples), strict=True)
        masks = [store.mask(s.mask).numpy() for s in samples if s.mask is not None]
        return forest, forest.fit(images, masks, insides)

    def run(self) -> list[dict[str, Any]]:
        """Train and evaluate unless that is finished; after an interruption from the start."""
        with locked(self.run_dir):
            state = self.ready()
            if state is not None and state["finished"]:
                return list(state["evaluations"])
            self.begin()
            samples = self.annotated
            what = f"{self.images(samples)} with labels of {self.config.data_dir}"
            head = [f"A random forest on {what}: {', '.join(s.name for s in samples[:5])}"]
            head += self.about_test("after training")
            head += [f"{name} = {value}" for name, value in self.settings.items()]
            with RunLog(self.run_dir, self.stage) as log:
                log.header([*head, f"scikit-learn {metadata.version('scikit-learn')}"])
                forest, pixels = self.taught()
                log.line(f"Learnt from {pixels} pixels")
                counts = self._predict(forest)
                scores = Scores.from_confusion(counts)
                for line in evaluation_lines(scores):
                    log.line(line)
                entry = {"epoch": 0, **scores.as_dict()} | ({FIT: True} if self.fit else {})
                log.metrics({"evaluation": entry})
            self.evaluations = [{**entry, "confusion": counts.tolist()}]
            self.state.finish(self.snapshot(finished=True))
            write_results(self.run_dir.parent, self.stage)
        return self.evaluations

    def _predict(self, forest: PixelForest) -> Counts:
        """Write the predictions of the tested images; returns its confusion matrices (n, C, C)."""
        scores, store = SegmentationScores(self.config.num_classes), self.job.store
        for sample in self.tested:
            prediction = forest.predict(*pixels_of(store, sample.image))
            path = self.run_dir / "epoch_0" / picture_name(sample.name)
            save_prediction(path, prediction, self.config.mapping)
            if sample.mask is not None:
                scores.add(torch.from_numpy(prediction), store.mask(sample.mask))
        return scores.counts()
