#!/usr/bin/env bash
# Certificates for Ray's TLS between nodes: an authority once, then one certificate for each node's address. See docs/security.md.
#   cluster/tls.sh authority DIR
#   cluster/tls.sh node DIR ADDRESS
set -euo pipefail
umask 077

usage() { sed -n '3,4s/^# *//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[ $# -ge 2 ] || usage
folder=$2

case "$1" in
  authority)
    [ ! -e "$folder/ca.key" ] || { echo "$folder/ca.key: is there already; a new authority would cut off all nodes" >&2; exit 2; }
    mkdir -p "$folder"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1825 -subj "/CN=beats-ray authority" \
      -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign \
      -keyout "$folder/ca.key" -out "$folder/ca.crt" 2>/dev/null
    ;;
  node)
    [ $# -eq 3 ] || usage
    address=$3
    [ -e "$folder/ca.key" ] || { echo "$folder/ca.key: missing; make it with: $0 authority $folder" >&2; exit 2; }
    case "$address" in *[!0-9.:a-f]*) name="DNS:$address" ;; *) name="IP:$address" ;; esac
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$address" \
      -keyout "$folder/$address.key" 2>/dev/null |
      openssl x509 -req -days 365 -CA "$folder/ca.crt" -CAkey "$folder/ca.key" -CAcreateserial -out "$folder/$address.crt" \
        -extfile <(printf 'subjectAltName=%s,DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n' "$name") 2>/dev/null
    ;;
  *) usage ;;
esac
