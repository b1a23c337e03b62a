#!/bin/bash
# One task per GPU; JAX takes addresses and numbers from Slurm. The signal before the time limit, and a requeue, go on where it was.
#SBATCH --job-name=lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
srun --kill-on-bad-exit=1 python train.py --config configs/pods/slurm-8b.yaml "$@"
