"""A plan as JSON: what `recommend` and `estimate` print, and what a run's plan.json keeps.

Separate so that the commands, the run folder and the wizard spell one plan in one way.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from engine.plan.device import Device
from engine.plan.ladder import Alternative
from engine.plan.recommend import Recommendation
from engine.plan.verdict import Estimate


def estimate_document(needs: Estimate) -> dict[str, Any]:
    """An estimate; sizes in bytes."""
    document = asdict(needs)
    return document | {"range_bytes": list(needs.range_bytes)}


def device_document(device: Device) -> dict[str, Any]:
    """Where a plan is for; sizes in bytes."""
    return {
        "name": device.name,
        "kind": device.kind,
        "uuid": device.uuid,
        "total_bytes": device.total_bytes,
        "can_give_bytes": device.can_give_bytes,
        "planned": device.planned,
    }


def advice_document(advice: Recommendation, device: Device) -> dict[str, Any]:
    """A recommendation: config, reasons, estimate, alternatives."""
    return {
        "config": advice.config.file_values(),
        "reasons": dict(advice.reasons),
        "estimate": estimate_document(advice.estimate),
        "alternatives": [alternative_document(other) for other in advice.alternatives],
        "attention": asdict(advice.attention),
        "not_trained": advice.not_trained,
        "duration": asdict(advice.duration) if advice.duration else None,
        "tokens_per_second": advice.tokens_per_second,
        "device": device_document(device),
    }


def plan_document(
    needs: Estimate, device: Device, reasons: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The content of plan.json: what was predicted, for which card, and why."""
    return {
        "device": device_document(device),
        "estimate": estimate_document(needs),
        "reasons": dict(reasons or {}),
    }


def alternative_document(other: Alternative) -> dict[str, Any]:
    """Another plan, or a rung of the ladder; sizes in bytes."""
    return {
        "name": other.name,
        "changes": dict(other.changes),
        "device_bytes": other.estimate.device_bytes,
        "saves_bytes": other.saves_bytes,
        "verdict": other.estimate.verdict,
        "trade": other.trade,
    }
