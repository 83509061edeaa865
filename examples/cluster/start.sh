#!/bin/sh
# start.sh FOLDER NAME=USER@HOST ...: copies FOLDER (cluster.toml, model) to ~/fastee on each machine by ssh and starts its node there.
# Each machine needs fastee on its PATH and, where cluster.toml lists public keys, its own ~/fastee/NAME.keys (never copied).
set -eu
folder=$1
shift
for pair in "$@"; do
  name=${pair%%=*} host=${pair#*=}
  rsync -a --exclude='*.keys' "$folder"/ "$host":fastee/
  ssh "$host" "cd fastee && keys= && if test -f $name.keys; then keys='--keys $name.keys'; fi
    nohup fastee node --config cluster.toml --name $name \$keys >$name.log 2>&1 </dev/null & echo started $name on \$(hostname)"
done
