"""Sphinx builds the documentation site with this: `make docs`.

Warnings are errors, and every cross reference to a name of ours must resolve. The inventories of other projects (Trio,
Python) come over the network, so they are used only when DOCS_ONLINE is set: `make docs ONLINE=1`. Without them the
names of other projects are shown without a link.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_ext")]

from pioneer_tunnel import __version__  # noqa: E402  # the path is set above

project = "pioneer-tunnel"
author = "The pioneer-tunnel authors"
copyright = f"2026, {author}"  # noqa: A001  # Sphinx gives the name
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "inline_svg",
    "public_names",
    "repository_links",
]
nitpicky = True
nitpick_ignore = [
    ("py:class", private)  # stands in a public signature, and needs no page of its own
    for private in (
        "pioneer_tunnel._model.addresses.PublicUrl",
        "pioneer_tunnel._model.keys.SigningIdentity",
        "pioneer_tunnel._net.network_changes.WatchNetwork",
        "pioneer_tunnel._net.tls.by_name.Certificates",
        "pioneer_tunnel._net.proxies.choice.ProxyChoice",
        "pioneer_tunnel._wire.links.LinkPlace",
        "pioneer_tunnel._wire.messages.Spread",
        "pioneer_tunnel.access_log.entry.Entry",
        "pioneer_tunnel.relay.gateways.other_nodes.OtherNodes",
        "pioneer_tunnel.relay.visitors.passing.Passing",
        "pioneer_tunnel.gateway.keystore.system._Backend",
        "pioneer_tunnel.gateway.tls_config.TlsConfig",
        "pioneer_tunnel.relay.fleet.redis_address.RedisAccess",
        "pioneer_tunnel.relay.fleet.redis_address.RedisAddress",
        "pioneer_tunnel.relay.gateways.registry.Directory",
        "pioneer_tunnel.relay.gateways.registry.Registry",
        "pioneer_tunnel.relay.gateways.takeover.TakeoverRules",
        "pioneer_tunnel.transports.counts.TunnelCounts",
        "pioneer_tunnel.relay.handover.Handover",
        "pioneer_tunnel.relay.inherited.Inherited",
        "pioneer_tunnel.transports.counts.TunnelCounts",
        "pioneer_tunnel.testing.faulty_dialer.RelayInMemory",
        "pioneer_tunnel.testing.memory_stream._Direction",
        "pioneer_tunnel.testing.scenario._T",
        "pioneer_tunnel.transports.link_checks.LinkChecks",
        "pioneer_tunnel.transports.process.config.ProcessConfig",
        "pioneer_tunnel.transports.redial.Redial",
        "pioneer_tunnel.tunnel.options.TunnelOptions",
    )
]
nitpick_ignore_regex = [("py:.*", r"(?!pioneer_tunnel).*")]  # names of others may have no link

if os.environ.get("DOCS_ONLINE"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_timeout = 30
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "trio": ("https://trio.readthedocs.io/en/stable", None),
        "trio-websocket": ("https://trio-websocket.readthedocs.io/en/stable", None),
        "hypothesis": ("https://hypothesis.readthedocs.io/en/latest", None),
    }

# Markdown
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_heading_anchors = 4
exclude_patterns = ["_build", "_ext"]
highlight_language = "none"

# The reference, from docstrings
default_role = "literal"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_use_ivar = True
toc_object_entries_show_parents = "hide"

# External links, for `make linkcheck`
linkcheck_timeout = 30
linkcheck_retries = 2
linkcheck_ignore = [r".*\.example\.com.*", r"https?://(localhost|127\.0\.0\.1).*"]
linkcheck_anchors = False

html_theme = "furo"
html_title = f"pioneer-tunnel {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
