#!/bin/bash
# FedSpaLLM on a Slurm cluster: rank 0 is the server, 16 ranks hold one client each, 4 ranks and 4 GPUs per node.
# Adapt this template. It follows the documentation of Slurm and was not run on a cluster.
#
#   sbatch examples/hpc/slurm.sh configs/llama2_7b_16_clients.yaml
#
# Before: install on a login node with the cluster's own MPI (module load ...; MPICC=mpicc pip install -e '.[mpi]'
# --no-binary mpi4py -c constraints.txt), and download the model there: compute nodes often have no network.
#SBATCH --job-name=fedspallm
#SBATCH --ntasks=17
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120                     # two minutes before the end: every rank ends, and state/ stays
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
CONFIG=${1:?usage: sbatch examples/hpc/slurm.sh CONFIG.yaml [key=value ...]}
shift

source "${VENV:-.venv}/bin/activate"
export HF_HUB_OFFLINE=1                       # use the model that was downloaded
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# A rank that fails aborts the others; --kill-on-bad-exit covers ranks that are killed. If every rank reports that it is
# alone, srun and the MPI library do not work together: try srun --mpi=pmix, or mpiexec instead.
# A job that was requeued has the same id, so that --resume goes on with its run.
code=0
srun --kill-on-bad-exit=1 fedspallm run "$CONFIG" "run_dir=runs/$SLURM_JOB_ID" "$@" --launcher mpi --resume || code=$?
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
