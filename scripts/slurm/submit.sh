#!/bin/bash
# Submits datastore -> index -> evaluation of kNN-LM as jobs that wait for one another; with
# GNN_CONFIG also index -> training of a GNN-LM -> its evaluation. From the repository's root:
#   NODES=2 CONFIG=configs/wikitext103/lm.yaml CKPT=runs/wikitext-103/checkpoints/best.ckpt \
#       CORPUS=wikitext-103 scripts/slurm/submit.sh [OPTIONS OF SBATCH, such as --partition=…]
# Tasks, GPUs, cores and hours of a job stand in the *.sbatch files beside this one.
set -euo pipefail

export CONFIG="${CONFIG:?expected the YAML file of the LM}"
export CKPT="${CKPT:?expected the checkpoint of the LM}"
export CORPUS="${CORPUS:?expected a folder of text, a data-bin or a known name}"
NODES=${NODES:-1}                 # hosts of each job; the index is built on one
export INDEX="${INDEX:-auto}"     # a faiss factory string, or auto by size
export KNN="${KNN:-}"             # flags of the memory: --knn.key_type …, --knn.k …
export EXTRA="${EXTRA:-}"         # any other flags of evaluate.py
export GNN_CONFIG="${GNN_CONFIG:-}" # the YAML file of a GNN-LM, to train one as well
export GNN_EXTRA="${GNN_EXTRA:-}" # any other flags of train.py and evaluate.py for that
run=runs/$(basename "$CORPUS")-gnn_lm
GNN_CKPT=${GNN_CKPT:-$run/checkpoints/best.ckpt} # where its training leaves it

# submit JOB NODES AFTER [OPTION...]: prints the job's number
submit() {
	local job=$1 nodes=$2 after=$3
	shift 3
	sbatch --parsable --nodes="$nodes" \
		${after:+"--dependency=afterok:$after" --kill-on-invalid-dep=yes} \
		"$@" "$(dirname "$0")/$job.sbatch" | cut -d ';' -f 1
}

datastore=$(submit datastore "$NODES" "" "$@")
index=$(submit index 1 "$datastore" "$@")
evaluation=$(submit evaluate "$NODES" "$index" "$@")
echo "datastore $datastore, index $index, evaluation $evaluation"

if [ -n "$GNN_CONFIG" ]; then
	gnn=$(submit gnn "$NODES" "$index" "$@")
	evaluation=$(CONFIG=$GNN_CONFIG CKPT=$GNN_CKPT EXTRA=$GNN_EXTRA \
		submit evaluate "$NODES" "$gnn" "$@")
	echo "GNN-LM $gnn, its evaluation $evaluation"
fi
