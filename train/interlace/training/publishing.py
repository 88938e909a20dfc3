"""A finished model on the hub, for those who ask for it."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from interlace.arguments import Arguments
from interlace.model.kept import KEPT
from interlace.model.saving import LICENCE_FILES

# What makes the model; the run's records hold paths of the machine it was made on
PUBLISHED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json", "base_model.json", f"{KEPT}/*"),
    *("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "prompt.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "README.md", "training_curves.png", *LICENCE_FILES),
)


def publish(output_dir: Path, arguments: Arguments, say: Callable[[str], None]) -> None:
    """Uploads the model to `hub_model_id`, or to a repository of the folder's name. The run is over: whatever goes wrong is said, with what to do."""
    name, api = arguments["hub_model_id"] or output_dir.resolve().name, HfApi(token=arguments["hub_token"])
    try:
        repository = api.create_repo(name, private=arguments["hub_private_repo"], exist_ok=True).repo_id
        # fnmatch patterns match below folders, too: checkpoints stay here
        ignored = ["checkpoint-*/*", "wandb/*"]
        api.upload_folder(
            repo_id=repository, folder_path=output_dir, revision=arguments["hub_revision"], allow_patterns=list(PUBLISHED), ignore_patterns=ignored
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        say(f"warning: the model is whole, but could not be uploaded to {name}: {reason}; later: hf upload {name} {output_dir} --exclude 'checkpoint-*'")
        return
    say(f"  uploaded to                      https://huggingface.co/{repository}")
