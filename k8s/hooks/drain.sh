#!/bin/bash
# preStop hook of expert pods: asks the front to move everything off this node, and returns when that is done.
# Kubernetes waits for it within the pod's grace period, of which the Ray process needs the rest.
#
# NODE_NAME             this node as our actors report it: the pod's name
# MOE_CLUSTER_TARGET    host:port of the front
# DRAIN_TIMEOUT_S       seconds that the moves may take
# DRAIN_LOG             where to say that it failed: a hook's own output is lost, that of the pod's first process is not
set -uo pipefail
: "${NODE_NAME:?}" "${MOE_CLUSTER_TARGET:?}" "${DRAIN_TIMEOUT_S:?}" "${DRAIN_LOG:=/proc/1/fd/1}"

# A little longer than the command's own limit, so that a command that hangs cannot use up the grace period.
timeout --kill-after=5 "$((DRAIN_TIMEOUT_S + 10))" \
  moe-cluster drain --node "$NODE_NAME" --timeout-s "$DRAIN_TIMEOUT_S" && exit 0

# The pod ends all the same: what it held has copies elsewhere, or goes back to the last checkpoint.
echo "moe-cluster: $NODE_NAME was not drained within $DRAIN_TIMEOUT_S s" >>"$DRAIN_LOG"
exit 1
