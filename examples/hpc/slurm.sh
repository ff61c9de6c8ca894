#!/bin/bash
# FedSpaLLM on a Slurm cluster: rank 0 is the server, 16 ranks hold a client each, 4 ranks and 4 GPUs a node.
# A pattern to adapt: it was written from Slurm's documentation and not run on a cluster.
#
#   sbatch examples/hpc/slurm.sh configs/llama2_7b_16_clients.yaml
#
# Before: install on a login node with the cluster's own MPI (module load ...; MPICC=mpicc pip install -e '.[mpi]'
# --no-binary mpi4py -c constraints.txt), and download the model there, since compute nodes often see no network.
#SBATCH --job-name=fedspallm
#SBATCH --ntasks=17
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log

set -euo pipefail
CONFIG=${1:?usage: sbatch examples/hpc/slurm.sh CONFIG.yaml [key=value ...]}
shift

source "${VENV:-.venv}/bin/activate"
export HF_HUB_OFFLINE=1                       # use the model that was downloaded
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# A rank that fails aborts the others; --kill-on-bad-exit covers one that is killed. If every rank says that it is alone,
# srun and the MPI library do not meet: try srun --mpi=pmix, or mpiexec instead.
srun --kill-on-bad-exit=1 fedspallm run "$CONFIG" "run_dir=runs/$SLURM_JOB_ID" "$@" --launcher mpi
