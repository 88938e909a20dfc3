"""Talks to a model or adapter about images and videos: many rounds, media at their places, answers as they come."""

import argparse

from interlace.errors import InputError, run_script
from interlace.inference.sampling import Sampling, check_frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True, help='model or adapter folder, hub id, or "demo"')
    parser.add_argument("--compare-with", metavar="P", help='a second model or adapter, asked the same; "base": the model under the adapter')
    parser.add_argument("--image-file", nargs="+", default=[], metavar="A", help="images for the first question")
    parser.add_argument("--video-file", nargs="+", default=[], metavar="V", help="videos for the first question, or folders of frames")
    parser.add_argument("--query", help="ask this once and print the answer; <image> and <video> mark places")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt; default: the one the model was trained with")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token each time")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest tokens that have this much probability together")
    parser.add_argument("--top-k", type=int, default=0, help="draw among so many of the likeliest tokens")
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="makes drawn answers repeatable")
    parser.add_argument("--num-frames", type=int, default=16, help="most frames of a video, as in training")
    parser.add_argument("--video-fps", type=float, help="frames per second of a video, as in training")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on an accelerator, else float32")
    parser.add_argument("--load-in-4bit", action="store_true", help="needs the quantization extra")
    options = parser.parse_args()
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.repetition_penalty, options.seed)
    check_frames(options.num_frames, options.video_fps)
    if sampling.idle:
        raise InputError("--top-p, --top-k and --seed have no effect at --temperature 0, the default; give a temperature above 0, or leave them out")
    from interlace.inference.attaching import Attachments
    from interlace.inference.chat import load_compared, run_terminal
    from interlace.inference.dialogue import Dialogue
    from interlace.inference.generation import load_generator

    attachments = Attachments(options.num_frames, options.video_fps)
    waiting = [*attachments.images(options.image_file), *attachments.videos(options.video_file)]  # before the weights: a wrong path is told at once
    generator = load_generator(options.model_path, options.dtype, options.load_in_4bit)
    dialogues, names = [Dialogue(generator, sampling, attachments)], ["model"]
    if options.compare_with:
        other, is_base = load_compared(generator, options.model_path, options.compare_with, options.dtype, options.load_in_4bit)
        dialogues.append(Dialogue(other, sampling, attachments, without_adapter=is_base))
        names = [options.model_path, options.compare_with]
    for dialogue in dialogues:
        dialogue.waiting += waiting
        dialogue.set_system(options.system)
    if options.query is None:
        run_terminal(*dialogues, names=names)
        return
    for name, dialogue in zip(names, dialogues, strict=True):
        print(dialogue.ask(options.query) if len(dialogues) == 1 else f"{name}: {dialogue.ask(options.query)}")


if __name__ == "__main__":
    run_script(main)
