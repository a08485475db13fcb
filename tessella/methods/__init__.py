"""The methods: name -> (config class, method class). The only table; a new method is one file and one line here."""

from __future__ import annotations

from typing import Any

from tessella.data.views import ViewSpec
from tessella.methods.coke import Coke, CokeConfig
from tessella.methods.jigclu import Jigclu, JigcluConfig
from tessella.methods.mejigclu import Mejigclu, MejigcluConfig
from tessella.methods.method import Method, Setting
from tessella.methods.smog import Smog, SmogConfig
from tessella.methods.swav import Swav, SwavConfig
from tessella.modules.backbone import Backbone

MethodConfig = SwavConfig | JigcluConfig | MejigcluConfig | SmogConfig | CokeConfig

METHODS: dict[str, tuple[type, type[Any]]] = {
    "coke": (CokeConfig, Coke),
    "jigclu": (JigcluConfig, Jigclu),
    "mejigclu": (MejigcluConfig, Mejigclu),
    "smog": (SmogConfig, Smog),
    "swav": (SwavConfig, Swav),
}


def build_method(config: MethodConfig, backbone: Backbone, setting: Setting) -> Method:
    """The method that a config is for, freshly initialised."""
    method: Method = METHODS[config.name][1](config, backbone, setting)
    return method


def views_of(config: MethodConfig) -> ViewSpec:
    """The views that the config's method wants to see of each image."""
    spec: ViewSpec = METHODS[config.name][1].view_spec(config)
    return spec
