#!/bin/bash
# As slurm.sh, from an Apptainer image (fedspallm.def): rank 0 is the server, 16 ranks hold one client each.
# Adapt this template. It follows the documentation of Slurm and Apptainer and was not run on a cluster.
#
#   sbatch examples/hpc/slurm_apptainer.sh configs/llama2_7b_16_clients.yaml
#
# Before: build fedspallm.sif, and download the model: compute nodes often have no network. IMAGE names another image.
# Apptainer mounts the home and the working directory; BIND=/scratch,/data adds folders of text and models.
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
CONFIG=${1:?usage: sbatch examples/hpc/slurm_apptainer.sh CONFIG.yaml [key=value ...]}
shift

export APPTAINERENV_HF_HUB_OFFLINE=1          # use the model that was downloaded
export APPTAINERENV_OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
if [ -n "${BIND:-}" ]; then
    export APPTAINER_BIND=$BIND
fi

# --nv gives the GPUs of the node to the container, and only warns where there is none.
code=0
srun --mpi=pmix --kill-on-bad-exit=1 apptainer run --nv "${IMAGE:-fedspallm.sif}" \
    run "$CONFIG" "run_dir=runs/$SLURM_JOB_ID" "$@" --launcher mpi --resume || code=$?
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
