"""The methods: name -> (config class, method class). The only table; a new method is one file and one line here."""

from __future__ import annotations

from tessella.methods.jigclu import Jigclu, JigcluConfig
from tessella.methods.method import Method
from tessella.methods.swav import Swav, SwavConfig

MethodConfig = SwavConfig | JigcluConfig

METHODS: dict[str, tuple[type, type[Method]]] = {
    "jigclu": (JigcluConfig, Jigclu),
    "swav": (SwavConfig, Swav),
}
