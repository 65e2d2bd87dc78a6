"""The arguments and options of the commands, with the sentences that --help shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

RECIPE_OPTIONS = "What to make"


def _option(text: str, *names: str, metavar: str = " ", panel: str | None = None) -> Any:
    """An option whose default is told in its help; a blank metavar keeps <bool> away from flags."""
    return typer.Option(*names, metavar=metavar, help=text, show_default=False, rich_help_panel=panel)


def _recipe_option(text: str, *names: str, metavar: str = " ") -> Any:
    return _option(text, *names, metavar=metavar, panel=RECIPE_OPTIONS)


Model = Annotated[str, typer.Argument(metavar="MODEL", show_default=False,
                                      help="A directory, a .gguf file, or a Hub id org/name or org/name@revision.")]
Checkpoint = Annotated[str, typer.Argument(metavar="PATH", show_default=False,
                                           help="A checkpoint, quantized or not: directory, .gguf file or Hub id.")]
MaybeCheckpoints = Annotated[list[str] | None, typer.Argument(
    metavar="PATH", show_default=False,
    help="A checkpoint: directory, .gguf file or Hub id; with --report also several.")]
JobsFile = Annotated[Path, typer.Argument(metavar="FILE", show_default=False,
                                          help="A YAML file; recipes/jobs/example.yaml explains its keys.")]
Json = Annotated[bool, _option("Print one JSON document on stdout and nothing else.", "--json")]
Quiet = Annotated[bool, _option("Print nothing but errors.", "--quiet", "-q")]
Out = Annotated[Path | None, _option("Where to write; must not exist yet (./MODEL-METHOD-SCHEME).", "--out", "-o",
                                     metavar="DIR")]
ExportOut = Annotated[Path | None, _option("Where to write; must not exist yet (./PATH-FORMAT, ./PATH-TYPE.gguf).",
                                           "--out", "-o", metavar="DIR|FILE")]
Device = Annotated[str, _option("Where to compute: auto, cpu, cuda or cuda:1 (auto).", metavar="NAME")]
DryRun = Annotated[bool, _option("Show the plan (sizes, memory, time); write nothing.", "--dry-run")]
Probe = Annotated[bool, _option("With --dry-run: solve one block first, in a temporary place.", "--probe")]
Redo = Annotated[list[str] | None, _option(
    "Redo only the linears of a finished --out that match, such as 'model.layers.20.*'; may be repeated. What is not "
    "said is as it was there.", "--redo", metavar="PATTERN")]
KeepStatistics = Annotated[bool, _option("Keep what the text showed of each linear's inputs in OUT/statistics, so that "
                                         "--redo needs no text.", "--keep-statistics")]
Restart = Annotated[bool, _option("Discard an unfinished run in OUT.partial.", "--restart")]
Method = Annotated[str | None, _recipe_option(
    "The ready recipe of a method: gptq, gptq-fast, equalize+gptq, rtn, awq, awq+gptq, smoothquant, w8a8, llm-int8, "
    "fp8, fp8-static, fp8-block, nf4, fp4, nf4-gptq, mxfp4, nvfp4, rotate, rotate+gptq, or a GGUF mixture such as "
    "q4_k_m (gptq).",
    metavar="NAME")]
RecipeName = Annotated[str | None, _recipe_option("A recipe file, or the name of a ready recipe.", metavar="FILE|NAME")]
Bits = Annotated[float | None, _recipe_option(
    "Bits of a code: 2, 3, 4 or 8 (4); with a fraction, as in 3.5, the same as --budget.", metavar="N")]
Budget = Annotated[str | None, _recipe_option(
    "Mixed precision: average bits per quantized weight, scales included, or a size of all tensors: 3.5, 4.2GB.",
    metavar="BITS|SIZE")]
GroupSize = Annotated[str | None, _recipe_option(
    "Input columns that share a scale (128); -1: a whole row; auto: the largest of 128, 64, 32 that fits every layer.",
    metavar="N|auto")]
Symmetric = Annotated[bool, _recipe_option("No zero points (the default).", "--symmetric")]
Asymmetric = Annotated[bool, _recipe_option("With zero points.", "--asymmetric")]
DoubleQuant = Annotated[bool, _recipe_option("Scales in 8 bits too (nf4, fp4).", "--double-quant")]
KvCache = Annotated[str | None, _recipe_option("fp8: calibrate the scales of a cache of keys and values in FP8.",
                                               "--kv-cache", metavar="TYPE")]
Format = Annotated[str | None, _recipe_option("compressed-tensors, gptq, awq, mlx, modelopt, fp8, bitsandbytes "
                                              "or aqlm (the method's).",
                                              "--format", metavar="NAME")]
Text = Annotated[str | None, _recipe_option(
    "Text to run through the model: builtin, FILE.txt, FILE.jsonl:FIELD, FILE.parquet:FIELD, or a Hub dataset "
    "NAME:CONFIG:SPLIT:FIELD (builtin).", metavar="SPEC")]
Samples = Annotated[int | None, _recipe_option("Calibration sequences (128; on a GPU 512).", metavar="N")]
Length = Annotated[int | None, _recipe_option("Tokens of each (512).", metavar="T")]
Dtype = Annotated[str | None, _recipe_option("Of what stays unquantized: bfloat16, float16, float32 (as it is).",
                                             metavar="NAME")]
Seed = Annotated[int | None, _recipe_option("For methods that draw random numbers (0).", metavar="N")]
Settings = Annotated[list[str] | None, _recipe_option("Any key of the recipe; may be repeated; wins over the rest.",
                                                      "--set", metavar="KEY=VALUE")]
Layers = Annotated[bool, _option("One line per linear.", "--layers")]
HeadersOnly = Annotated[bool, _option("With --layers: read no weights, so no statistics of their values.",
                                      "--headers-only")]
Sort = Annotated[str | None, _option("The layers by a figure of theirs, the worst first: error, sqnr_db, bytes, "
                                     "kurtosis, ...", "--sort", metavar="KEY")]
Top = Annotated[int | None, _option("Only the first N layers.", "--top", metavar="N")]
Tokens = Annotated[int | None, _option("With --against: tokens of built-in text that outputs are compared on; 0: "
                                       "weights only (512).", "--tokens", metavar="N")]
Diff = Annotated[tuple[str, str] | None, _option("Two checkpoints beside each other, tensors byte for byte.", "--diff",
                                                 metavar="A B")]
Memory = Annotated[bool, _option("What it needs to run, and what it would with every scheme it could have.",
                                 "--memory")]
ContextTokens = Annotated[int | None, _option("With --memory: tokens of each sequence (4096).", "--context",
                                              metavar="T")]
Batch = Annotated[int | None, _option("With --memory: sequences at one time (1).", "--batch", metavar="N")]
Kv = Annotated[str | None, _option("With --memory: type of cached keys and values: fp32, bf16, fp16, fp8, q8_0 or q4_0 "
                                   "(the model's, or fp8 where the checkpoint has scales).", "--kv", metavar="TYPE")]
Outliers = Annotated[bool, _option("The outlier features that calibration found (--recipe llm-int8-outliers).",
                                   "--outliers")]
Heatmap = Annotated[bool, _option("The error of every linear as a map: blocks by kinds, in colours.", "--heatmap")]
Report = Annotated[Path | None, _option("Write a page with maps, tables, recipe and manifest (needs qtool\\[report]).",
                                        "--report", metavar="FILE.html")]
Original = Annotated[str | None, _option("Measure the errors of weights and outputs against this original.",
                                          metavar="MODEL")]
Verify = Annotated[bool, _option("Check every file, tensor and key, with --against also errors and predictions; fail "
                                 "if one is wrong.", "--verify")]
System = Annotated[bool, _option("What this machine has.", "--system")]
Csv = Annotated[bool, _option("The layers as CSV on stdout.", "--csv")]
Checkpoints = Annotated[list[str], typer.Argument(metavar="PATH...", show_default=False,
                                                  help="Checkpoints, quantized or not: directories, .gguf files or "
                                                       "Hub ids.")]
Reference = Annotated[str | None, _option("The original: adds KL divergence and agreement.", metavar="MODEL")]
Stream = Annotated[bool | None, _option("One block in memory at a time, or the whole model (as there is memory).",
                                        "--stream/--no-stream")]
CacheFolder = Annotated[Path | None, _option("Where the original's part is kept for the next time "
                                             "(~/.cache/qtool/exits).", "--cache", metavar="DIR")]
NoCache = Annotated[bool, _option("Keep nothing.", "--no-cache")]
MemoryContext = Annotated[int | None, _option("Memory at inference with this many tokens in the cache of keys and "
                                              "values.", "--memory-context", metavar="T")]
MemoryBatch = Annotated[int | None, _option("With so many sequences of them (1).", "--memory-batch", metavar="N")]
Speed = Annotated[bool, _option("Time a prompt and the generation after it.", "--speed")]
Tasks = Annotated[str | None, _option("Accuracy on lm-eval's tasks, as in gsm8k,hellaswag,arc_easy,mmlu "
                                      "(qtool\\[tasks]).", "--tasks", metavar="NAMES")]
Limit = Annotated[int | None, _option("Only the first questions of each task.", "--limit", metavar="N")]
TaskFiles = Annotated[Path | None, _option("A folder with tasks of your own as lm-eval's YAML files; paths in them "
                                           "start there.", "--task-files", metavar="DIR")]
Markdown = Annotated[bool, _option("Print the tables as Markdown.", "--markdown")]
Corpus = Annotated[str, _option("What to read: builtin, FILE.txt, FILE.jsonl:FIELD, FILE.parquet:FIELD, or a Hub "
                                "dataset NAME:CONFIG:SPLIT:FIELD (builtin).", metavar="FILE|DATASET")]
Windows = Annotated[int, _option("How many windows of text (20).", metavar="N")]
Context = Annotated[int, _option("Tokens of each window (1024).", metavar="T")]
Target = Annotated[str | None, _option("compressed-tensors, gptq, awq, mlx, modelopt, fp8, bitsandbytes, gguf, "
                                       "onnx, hf (dense), imatrix (the model's importance matrix, for llama.cpp's "
                                       "quantizer and for --imatrix), or text (that the model makes up, for "
                                       "--calibration).", metavar="FORMAT")]
Requantize = Annotated[str | None, _option(
    "Where FORMAT cannot hold the codes: decode them and round again, with a scheme such as int4-g64 or a data-free "
    "recipe (rtn, nf4, fp8, ...).", metavar="SCHEME|RECIPE")]
GgufType = Annotated[str | None, _option("With --to gguf: f16, bf16, f32, a mixture of block types such as q4_k_m, or "
                                         "as the source is (auto).", "--type", metavar="TYPE")]
Imatrix = Annotated[Path | None, _option("llama.cpp's importance matrix, for a --type of block types.", "--imatrix",
                                         metavar="FILE")]
NoImatrix = Annotated[Path | None, typer.Option("--imatrix", hidden=True)]  # refused with the command that takes one
GraphDtype = Annotated[str | None, _option("onnx: in which the graph computes: float32, or float16 for GPUs (float32).",
                                           "--dtype", metavar="NAME")]
ExportText = Annotated[str | None, _option("imatrix: text to run through the model, as with quantize (builtin).",
                                           "--calibration", metavar="SPEC")]
ExportSamples = Annotated[int | None, _option("imatrix, text: sequences of text (128; on a GPU 512).", "--samples",
                                              metavar="N")]
ExportLength = Annotated[int | None, _option("imatrix, text: tokens of each (512).", "--sequence-length", metavar="T")]
ExportDevice = Annotated[str | None, _option("imatrix, text: where to compute: auto, cpu, cuda or cuda:1 (auto).",
                                             "--device", metavar="NAME")]
AccuracyLevel = Annotated[int | None, _option(
    "onnx: how MatMulNBits takes its inputs: 0 as they are, 1 float32, 2 float16, 3 bfloat16, 4 rounded to 8 bits, "
    "which is faster (0).", "--accuracy-level", metavar="N")]
PushTo = Annotated[str | None, _option("Upload the directory, with its model card, to this repository of the Hub.",
                                       "--push-to", metavar="NAMESPACE/NAME")]
Private = Annotated[bool, _option("Make that repository a private one.", "--private")]
Ray = Annotated[str | None, _option("Run on this Ray cluster: auto, or HOST:PORT of its head (here, one by one).",
                                    metavar="ADDRESS")]
