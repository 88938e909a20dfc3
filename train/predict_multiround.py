"""Talks to a model or adapter about images and videos: many rounds, media at their places; in the terminal, a browser, or for programs."""

import argparse
import os
import socket

from interlace.errors import InputError, run_script
from interlace.inference.sampling import Sampling, check_frames

SERVED = ("host", "port", "api-key", "max-upload-mb")


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
    served = parser.add_argument_group("in a browser, or for OpenAI's clients; arguments above are what requests leave open")
    served.add_argument("--web", action="store_true", help="a page in the browser, and --serve")
    served.add_argument("--serve", action="store_true", help="an endpoint for OpenAI's clients: /v1/chat/completions, images and videos as data: URLs")
    served.add_argument("--host", help="default: 127.0.0.1, which only this machine reaches; 0.0.0.0 for all networks")
    served.add_argument("--port", type=int, help="default: 8000; 0 takes a free one")
    served.add_argument("--api-key", metavar="KEY", help="what clients have to show; better in INTERLACE_API_KEY, which other users of the machine do not see")
    served.add_argument("--max-upload-mb", type=int, metavar="N", help="largest request, media of the conversation included; default: 64")
    options = parser.parse_args()
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.repetition_penalty, options.seed)
    check_frames(options.num_frames, options.video_fps)
    if sampling.idle:
        raise InputError("--top-p, --top-k and --seed have no effect at --temperature 0, the default; give a temperature above 0, or leave them out")
    if options.web or options.serve:
        serve(options, sampling, open_door(options))
        return
    useless = [name for name in SERVED if getattr(options, name.replace("-", "_")) is not None]
    if useless:
        raise InputError(f"--{', --'.join(useless)}: only with --web or --serve")
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


def open_door(options: argparse.Namespace) -> socket.socket:
    """Where the server will listen, before the model is loaded."""
    given = {"--query": options.query, "--compare-with": options.compare_with, "--image-file": options.image_file, "--video-file": options.video_file}
    useless = [name for name, value in given.items() if value]
    if useless:
        raise InputError(f"{', '.join(useless)}: not with --web or --serve, where questions come with their images and videos")
    if options.max_upload_mb is not None and options.max_upload_mb < 1:
        raise InputError(f"--max-upload-mb: expected at least 1, got {options.max_upload_mb}")
    from interlace.inference.doors import listen

    return listen(options.host or "127.0.0.1", 8000 if options.port is None else options.port)


def serve(options: argparse.Namespace, sampling: Sampling, door: socket.socket) -> None:
    from interlace.inference.conversations import Conversations, Uploads
    from interlace.inference.dialogue import Dialogue
    from interlace.inference.generation import load_generator
    from interlace.inference.serving import Service, name_of, run_server

    uploads = Uploads(options.num_frames, options.video_fps)
    generator = load_generator(options.model_path, options.dtype, options.load_in_4bit)
    Dialogue(generator).set_system(options.system)  # one that cannot be taken is told now
    names = frozenset({(options.host or "127.0.0.1").lower(), socket.gethostname().lower()})
    key = options.api_key or os.environ.get("INTERLACE_API_KEY", "")
    service = Service(name_of(options.model_path), sampling, options.system, options.web, key, options.max_upload_mb or 64, names)
    run_server(Conversations(generator, uploads), service, door)


if __name__ == "__main__":
    run_script(main)
