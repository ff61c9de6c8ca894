#!/bin/bash
# FedSpaLLM under PBS: rank 0 is the server, 16 ranks hold one client each, 4 ranks and 4 GPUs per node.
# Adapt this template. It follows the documentation of PBS and was not run on a cluster.
#
#   qsub -v CONFIG=configs/llama2_7b_16_clients.yaml examples/hpc/pbs.sh
#
# Overrides: OVERRIDES="key=value key=value" beside CONFIG, or arguments where qsub passes them on (-F).
# Before: install on a login node with the cluster's own MPI (module load ...; MPICC=mpicc pip install -e '.[mpi]'
# --no-binary mpi4py -c constraints.txt), and download the model there: compute nodes often have no network.
#PBS -N fedspallm
#PBS -l select=5:ncpus=32:mpiprocs=4:ngpus=4
#PBS -l walltime=04:00:00
#PBS -j oe
#PBS -r y

set -euo pipefail
cd "$PBS_O_WORKDIR"
: "${CONFIG:?usage: qsub -v CONFIG=CONFIG.yaml examples/hpc/pbs.sh}"
read -ra overrides <<< "${OVERRIDES:-}"

source "${VENV:-.venv}/bin/activate"
export HF_HUB_OFFLINE=1                       # use the model that was downloaded
export OMP_NUM_THREADS=8

# 17 of the 20 places; if your MPI does not support PBS, add --hostfile "$PBS_NODEFILE".
# PBS ends a job with SIGTERM. A job that is run again, by PBS or by qrerun, has the same id, so that --resume goes on with it.
mpiexec -n 17 fedspallm run "$CONFIG" "run_dir=runs/${PBS_JOBID%%.*}" "${overrides[@]}" "$@" --launcher mpi --resume
