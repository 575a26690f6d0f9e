//! Network namespaces that reproduce every stuck TCP state.
