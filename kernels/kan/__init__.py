"""Linear layers of KANs whose edges are sums of bumps: one op, several implementations."""

from .api import rswaf_linear, unsupported_reasons

__all__ = ["rswaf_linear", "unsupported_reasons"]
