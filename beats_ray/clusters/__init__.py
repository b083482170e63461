"""Checks of the files that start clusters, before they cost money: `ray up`, Kubernetes manifests, IAM policies."""
