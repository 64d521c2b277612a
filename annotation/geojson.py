"""Read GeoJSON, RFC 7946, with coordinates in pixels, as QuPath exports it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from annotation.planes import Plane
from annotation.shapes import Polygon, Shape, Stroke, points

PLANE = {"c": -1, "z": 0, "t": 0}  # where QuPath writes none


def is_geojson(content: Any) -> bool:
    """Whether this is what a GeoJSON file holds: a collection, a feature, or a list of them."""
    if isinstance(content, list):
        return bool(content) and all(isinstance(c, dict) and "geometry" in c for c in content)
    return isinstance(content, dict) and content.get("type") in ("FeatureCollection", "Feature")


def shapes_of(content: Any) -> list[Shape]:
    """The shapes of a file; a line is one pixel wide. Raises ValueError and the like."""
    features = content if isinstance(content, list) else content.get("features", [content])
    found = [(_name(feature), feature["geometry"]) for feature in features if feature["geometry"]]
    return [Shape(name, tuple(_parts(where)), _plane(where)) for name, where in found]


def _plane(geometry: dict[str, Any]) -> Plane:
    """QuPath's plane, counted from 0 there, without one the first; channel -1 stands for all."""
    plane = geometry.get("plane") or {}
    return Plane(0, *(int(plane.get(axis, first)) + 1 for axis, first in PLANE.items()))


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
