"""Sweeps: Hydra's syntax, Optuna's samplers and pruners, warm groups of workers.

api            the functions of the command line and of Python
syntax         words -> axes                     space      axes, conditions and the words of a trial
search         Optuna's distributions            conditions which options have a swept key
specification  what the words ask for            planning   checks of all trials, and what fits the machines
settings       the section `sweep` for a search space
driver         the loop                          study      the journal: ask, report, finish
remote         sweeps on the head of a cluster   plugin     Hydra's sweeper
progress       files and display                 stored     run roots on object stores
warm_start     trials of another sweep           algorithms Optuna's samplers and pruners
records        trials.csv, best.yaml, log.txt    repeats    mean and spread over `sweep.over`
report         report.html                       observer   progress and outcome for the caller
"""
