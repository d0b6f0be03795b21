"""Does a job with roles fit?  Asked of all that live on a rank, as `engine.plan.memory` asks it of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

from engine.config import Config, resolve_layout, world_size_of
from engine.config.placement import ACTOR, CRITIC, REFERENCE
from engine.config.rl import CRITIC_OBJECTIVES
from engine.distributed.host_memory import Room
from engine.errors import ConfigError, RequestError
from engine.plan.memory import SLACK, gib
from engine.plan.roles import Place, places_of

Values = dict[str, Any]


def require_room_for_roles(config: Config, ranks: Sequence[int], room: Room | None, *, on_gpu: bool) -> list[str]:
    """As `engine.plan.memory.require_room`.

    Raises:
        RequestError: it is more than there is.
    """
    places = _places(config, ranks, on_gpu)
    total = _needed(places, on_gpu)
    if room is not None and total * (1 - SLACK) > room.available:
        who = "this process" if len(ranks) == 1 else f"the {len(ranks)} processes on this machine"
        full = max(places, key=lambda place: place.total)
        raise RequestError(
            f"this job does not fit: {who} would hold {gib(total)}, and {gib(room.available)} are {room.where}. On "
            f"rank {full.ranks.start} live {', '.join(part.role for part in full.parts)}: {gib(full.stays)} stay, and "
            f"{full.longest.role} takes {gib(full.turn(full.longest))} in its turn. "
            + _remedy(config, ranks, room.available, on_gpu))
    of_all = "" if len(ranks) == 1 else f" of {len(ranks)} processes"
    there = "" if room is None else f", and {gib(room.available)} {room.where}"
    stays = sum(place.stays for place in places)
    return [f"memory: at most {gib(total)}{of_all}{there}", f"  {gib(stays)} stay, the rest comes and goes with roles"]


def _places(config: Config, ranks: Sequence[int], on_gpu: bool) -> list[Place]:
    """What lives on each of these ranks."""
    places = places_of(config, on_gpu)
    return [next(place for place in places if rank in place.ranks) for rank in ranks]


def _needed(places: Sequence[Place], on_gpu: bool) -> float:
    """Bytes of the memory that these ranks share; where that is the host's, what rests lies there too."""
    return sum(place.total + (0 if on_gpu else place.on_host) for place in places)


def _remedy(config: Config, ranks: Sequence[int], available: float, on_gpu: bool) -> str:
    """The first change that makes it fit, of those that keep the number of processes; they are in order of cost."""
    for words, changed in changes_of_roles(config, on_gpu):
        need = _needed(_places(changed, ranks, on_gpu), on_gpu)
        if need <= available:
            return f"Set {words}: {gib(need)}"
    return ("No change on as many processes is enough: give the roles ranks of their own (roles.*.ranks), more "
            "processes, or smaller models")


def changes_of_roles(config: Config, on_gpu: bool) -> Iterator[tuple[str, Config]]:
    """What saves memory, cheapest first: each change, then each together with those before it."""
    trained = [ACTOR, *([CRITIC] if config.run.objective in CRITIC_OBJECTIVES else [])]
    steps: list[tuple[str, Callable[[Values], None]]] = [
        ("rollout.batch=8", lambda values: values["rollout"].update(batch=min(values["rollout"]["batch"], 8))),
        *([("roles.reference.offload=true and that of roles.reward", _resting_judges),
           *((f"roles.{name}.offload=true", _resting(name)) for name in reversed(trained))] if on_gpu else ()),
        ("batch.micro=1", lambda values: values["batch"].update(micro=1)),
        *((f"{key}: {value} in the layout of {' and '.join(trained)}", _layout(trained, key, value))
          for key, value in (("zero", 1), ("recompute", "selective"), ("recompute", "full"), ("zero", 2), ("zero", 3)))]
    together: list[str] = []
    base = config.to_dict()
    changed = deepcopy(base)
    for words, change in steps:
        alone = deepcopy(base)
        change(alone)
        if alone == base:
            continue
        before = deepcopy(changed)
        change(changed)
        together.append(words)
        for said, values in ((words, alone), ("; ".join(together), changed)):
            try:
                yield said, resolve_layout(Config.model_validate(values), world_size_of(config))
            except (ConfigError, ValueError):
                if values is changed:
                    changed = before
                    together.pop()


def _resting(name: str) -> Callable[[Values], None]:
    return lambda values: values["roles"][name].update(offload=True)


def _resting_judges(values: Values) -> None:
    values["roles"][REFERENCE]["offload"] = True
    for source in values["roles"]["reward"]:
        source["offload"] = source["load"] is not None


def _layout(names: Sequence[str], key: str, value: object) -> Callable[[Values], None]:
    """Of roles that learn; a level of ZeRO is never lowered, and stays where there are no copies."""
    def change(values: Values) -> None:
        for name in names:
            parallel = values["roles"][name]["parallel"]
            copies = parallel is not None and parallel["data"] * parallel["context"]
            if parallel is not None and (key != "zero" or (copies > 1 and parallel["zero"] < int(str(value)))):
                parallel[key] = value
                if key == "recompute":
                    parallel["recompute_layers"] = None
        if values["roles"][ACTOR]["parallel"] is not None:
            values["parallel"] = dict(values["roles"][ACTOR]["parallel"])

    return change
