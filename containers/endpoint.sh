#!/bin/sh
# Check the site file, configure the endpoint at the first start, and run it in the foreground. Arguments go to
# `globus-compute-endpoint start`.
set -eu

fedspallm site "$FEDSPALLM_SITE"
if ! [ -d "$HOME/.globus_compute/fedspallm" ]; then
    globus-compute-endpoint configure --multi-user false \
        --template-config "$(dirname "$(dirname "$0")")/user_config_template.yaml.j2" fedspallm
fi
exec globus-compute-endpoint start fedspallm "$@"
