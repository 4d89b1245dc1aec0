"""What `switchrun doctor` looks at: packages, torch, memory, GPUs, disks, the Hub, the model; a file each. No torch."""

from switchrun.doctor.check import Check, Status, exit_code, worst
from switchrun.doctor.examination import Questions, examine

__all__ = ["Check", "Questions", "Status", "examine", "exit_code", "worst"]
