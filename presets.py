"""The presets: what ``--preset`` sets, with the sources of the values in ``docs/settings.md``.

Flags win over a preset, a preset over a script's own defaults. ``auto`` looks at the images, too
(``stages/presets.py``).
"""

from typing import Any

ROBUST: dict[str, Any] = dict(
    use_unlabelled=True,
    self_crop=256,
    class_weight="balanced_sqrt",
    fine_crop=96,
    fine_scale=1.4,
    fine_rotation=45.0,  # with the quarter turns: any angle
    fine_contrast=0.3,
    fine_noise=0.05,
    fine_blur=0.8,
    fine_illumination=0.05,
    fine_batch_size=8,
    fine_steps=400,
    fine_optimizer="adamw",
    fine_schedule="onecycle",
    fine_clip=5.0,
    fine_average=0.98,
    fine_lr_encoder=3e-4,
    fine_lr_decoder=1e-3,
    sup_lr=1e-3,
)
PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "robust": ROBUST, "auto": ROBUST}
PRESET_MEANINGS = {
    "paper": "the published protocol",
    "robust": "the fine-tuning that held on other sets",
    "auto": "robust, and what the images ask for",
}
