"""Read GeoJSON, RFC 7946, with coordinates in pixels, as QuPath exports it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from annotation.shapes import Polygon, Shape, Stroke, points


def is_geojson(content: Any) -> bool:
    """Whether this is what a GeoJSON file holds: a collection, a feature, or a list of them."""
    if isinstance(content, list):
        return bool(content) and all(isinstance(c, dict) and "geometry" in c for c in content)
    return isinstance(content, dict) and content.get("type") in ("FeatureCollection", "Feature")


def shapes_of(content: Any) -> list[Shape]:
    """The shapes of a file; a line is one pixel wide. Raises ValueError and the like."""
    features = content if isinstance(content, list) else content.get("features", [content])
    return [Shape(_name(f), tuple(_parts(f["geometry"]))) for f in features if f["geometry"]]


def _name(feature: dict[str, Any]) -> str:
    """The class: QuPath's classification, else a property by one of the usual names."""
    properties = feature.get("properties") or {}
    found = properties.get("classification")
    if isinstance(found, dict):
        found = found.get("name") or ": ".join(map(str, found.get("names") or ()))
    for key in ("class", "label", "class_name"):
        found = found or properties.get(key)
    return "" if found is None else str(found)


def _parts(geometry: dict[str, Any]) -> Iterator[Polygon | Stroke]:
    kind = geometry["type"]
    if kind == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _parts(part)
        return
    where = geometry["coordinates"]
    if kind == "Polygon":
        yield Polygon(tuple(points(ring, least=3) for ring in where))
    elif kind == "MultiPolygon":
        for rings in where:
            yield Polygon(tuple(points(ring, least=3) for ring in rings))
    elif kind == "LineString":
        yield Stroke((points(where),), 1.0)
    elif kind == "MultiLineString":
        yield Stroke(tuple(points(line) for line in where), 1.0)
    elif kind in ("Point", "MultiPoint"):
        yield Stroke(tuple(points([p]) for p in ([where] if kind == "Point" else where)), 1.0)
    else:
        raise ValueError(f"geometry {kind}")
