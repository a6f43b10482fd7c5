"""Supply chain: lock files, audit and SBOM."""
