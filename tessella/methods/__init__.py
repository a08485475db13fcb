"""The methods by name. A method is one file and one line here, or an entry point `tessella.methods` of a package."""

from __future__ import annotations

from tessella.data.views import ViewSpec
from tessella.methods.coke import Coke
from tessella.methods.jigclu import Jigclu
from tessella.methods.mejigclu import Mejigclu
from tessella.methods.method import Method, MethodConfig, Setting
from tessella.methods.smog import Smog
from tessella.methods.swav import Swav
from tessella.modules.backbone import Backbone
from tessella.registry import Registry

__all__ = ["METHODS", "Method", "MethodConfig", "Setting", "build_method", "method_of", "views_of"]

METHODS: Registry[type[Method]] = Registry(
    "methods", {"swav": Swav, "jigclu": Jigclu, "mejigclu": Mejigclu, "smog": Smog, "coke": Coke}
)


def method_of(config: MethodConfig) -> type[Method]:
    """The method that a config is for."""
    return METHODS.find(config.name)


def build_method(config: MethodConfig, backbone: Backbone, setting: Setting) -> Method:
    """The method that a config is for, freshly initialised."""
    return method_of(config)(config, backbone, setting)


def views_of(config: MethodConfig) -> ViewSpec:
    """The views of each image that the config's method needs."""
    return method_of(config).view_spec(config)
