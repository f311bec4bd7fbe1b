"""The one reader of YAML: plain values, and nothing that is lost without a word."""

from typing import Any

import yaml


class KeyGivenTwice(yaml.YAMLError):
    """YAML forbids it, PyYAML keeps the last one."""


class _Loader(yaml.SafeLoader):
    """Keys are compared as values, before ``<<`` puts in those that they may replace."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                key: Any = "<<"
            elif isinstance(key_node, yaml.ScalarNode):
                key = self.construct_object(key_node)
            else:
                continue  # the library refuses lists and mappings as keys
            if key in seen:
                raise KeyGivenTwice(f"line {key_node.start_mark.line + 1}: the key '{key}' is given twice")
            seen.add(key)
        super().flatten_mapping(node)


def read_yaml(text: str) -> Any:
    """The value that ``text`` is; yaml.YAMLError if it is no YAML of plain values, KeyGivenTwice among them."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise yaml.YAMLError(f"a value is not what it is written as ({error})") from error
