"""The paper: a view and its geometry, sampling and matching of patches, the losses."""
