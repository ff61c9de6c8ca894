"""Read and write YAML as people mean it: YAML 1.2 scalars, and a key stands only once.

PyYAML follows YAML 1.1, where an unquoted 2:4 is 124 in base sixty, 010 is eight, 1e-3 is text and 2024-01-31 is a date.

Aliases of aliases make billions of values of a few lines, and brackets within brackets exhaust the stack: both end at a
limit that no configuration comes near.
"""

import re
from collections import Counter
from typing import Any

import yaml

from fedspallm_appfl.errors import quoted

DEPTH = 50  # groups within groups
VALUES = 200_000  # where each alias counts as all that it stands for

_RETYPED = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}
_RESOLVERS = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _RETYPED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._values: dict[int, int] = {}  # id of a node -> values in it

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._values:
                raise _too_much("an alias stands for a group that it lies in", self.peek_event().start_mark)
            return node
        self._depth += 1
        if self._depth > DEPTH or len(self._values) > VALUES:
            raise _too_much(f"more than {DEPTH} groups in each other, or {VALUES} values", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None:
            self._values[id(node)] = self._counted(node)
        return node

    def _counted(self, node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        inner = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
        values = 1 + sum(self._values[id(one)] for one in inner)
        if values > VALUES:
            raise _too_much(f"more than {VALUES} values, with aliases followed", node.start_mark)
        return values

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, times in keys.items():
            if times > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {quoted(key)} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _too_much(what: str, where: yaml.Mark) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, what, where)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers  # quotes what the loader would not read as text


def load(text: str) -> Any:
    """Read YAML.

    Raises:
        yaml.YAMLError: the text is not YAML, or a key stands twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except ValueError as error:
        raise yaml.YAMLError(f"a number cannot be read: {str(error)[:200]}") from error


def dump(value: Any) -> str:
    """Write plain values so that `load` gives them back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Every value of nested mappings and lists under its whole key."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            name: one for word, of in inner for name, one in flat(of, f"{key}.{word}" if key else str(word)).items()
        }
    return {key: value}
