#!/usr/bin/env bash
# Builds the image of cluster/Dockerfile, pushes it, and has the files beside it name it by its digest.
#
#     cluster/image.sh example.com/emloc-ray
set -euo pipefail

[ $# -eq 1 ] || {
    echo "usage: $0 REGISTRY/NAME" >&2
    exit 2
}

cd "$(dirname "$0")/.."
metadata=$(mktemp)
trap 'rm -f "$metadata"' EXIT
docker buildx build -f cluster/Dockerfile --platform linux/amd64 -t "$1:latest" --push --metadata-file "$metadata" .
digest=$(sed -n 's/.*"containerimage.digest": *"\(sha256:[0-9a-f]\{64\}\)".*/\1/p' "$metadata")
[ -n "$digest" ] || {
    echo "$0: docker names no digest of $1" >&2
    exit 1
}
sed -i -E "s|^(  image: ).*@sha256:[0-9a-f]{64}$|\1$1@$digest|" cluster/aws.yaml cluster/gcp.yaml
sed -i -E "s|^(  newName: ).*|\1$1|; s|^(  digest: ).*|\1$digest|" cluster/kubernetes/cluster/kustomization.yaml
echo "$1@$digest"
