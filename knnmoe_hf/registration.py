"""
Makes transformers and lm-evaluation-harness know memories, without importing either before it is used.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
_AUTO_MODEL = "transformers.models.auto.modeling_auto"
_GENERATION = "transformers.generation.utils"
_HARNESS_MODELS = "lm_eval.models"
_HARNESS_EVALUATOR = "lm_eval.evaluator"


def register_all() -> None:
    """
    Registers memories with other libraries, now or as soon as these are imported.

    - transformers: `AutoConfig` and `AutoModelForCausalLM` load memories, and `generate` keeps the memory that is in
      force when it begins. What is registered is a configuration and a loader, not a model class: a third-party model
      class would lose the native fast experts and checkpoint names.
    - lm-evaluation-harness: the model type `knnmoe`, and a check of each evaluation's prompts against those that the
      memory was built from.
    """
    _when_imported(_AUTO_CONFIG, _register_config)
    _when_imported(_AUTO_MODEL, _register_loader)
    _when_imported(_GENERATION, _wrap_generations)
    _when_imported(_HARNESS_MODELS, _register_model_type)
    _when_imported(_HARNESS_EVALUATOR, _check_prompts_of_evaluations)


def _when_imported(name: str, then: Callable[[], None]) -> None:
    """Calls a function: now if a module of this name has been imported, else right after its import."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _AfterImport(name, then))


def _register_config() -> None:
    from knnmoe_hf.config import KNNMoEConfig

    sys.modules[_AUTO_CONFIG].AutoConfig.register(KNNMoEConfig.model_type, KNNMoEConfig, exist_ok=True)


def _register_loader() -> None:
    from knnmoe_hf.models.auto import KNNMoEForCausalLM

    auto = sys.modules[_AUTO_MODEL].AutoModelForCausalLM
    auto.register(KNNMoEForCausalLM.config_class, KNNMoEForCausalLM, exist_ok=True)


def _wrap_generations() -> None:
    from knnmoe_hf.models.generations import wrap_generations

    wrap_generations(sys.modules[_GENERATION].GenerationMixin)


def _register_model_type() -> None:
    # after the harness's own model types, which it registers only while there are no others
    registry = sys.modules["lm_eval.api.registry"].model_registry
    if "knnmoe" not in registry:  # releases of the harness that look for plugins know it from our entry point
        registry.register("knnmoe", target="knnmoe_hf.evaluation.harness:KNNMoELM")


def _check_prompts_of_evaluations() -> None:
    module = sys.modules[_HARNESS_EVALUATOR]
    evaluate = module.evaluate

    @functools.wraps(evaluate)
    def evaluate_and_check(*args, **kwargs):
        if "knnmoe_hf.models.attach" in sys.modules:  # else no model has a memory
            from knnmoe_hf.evaluation.harness_prompts import warn_of_cached_answers, warn_of_other_prompts

            arguments = inspect.signature(evaluate).bind(*args, **kwargs).arguments
            warn_of_other_prompts(arguments)
            warn_of_cached_answers(arguments.get("lm"))
        return evaluate(*args, **kwargs)

    module.evaluate = evaluate_and_check


class _AfterImport(MetaPathFinder):
    """
    Calls a function once, right after a module was imported.

    It stays in `sys.meta_path` until the module has been executed: the module may be looked up without being imported
    (`importlib.util.find_spec`), and an import may fail and be tried again.
    """

    def __init__(self, name: str, then: Callable[[], None]):
        self.name, self.then = name, then

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != self.name:
            return None
        spec = self._found_by_the_others(path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self.then()

            spec.loader.exec_module = execute_and_call
        return spec

    def _found_by_the_others(self, path, target) -> ModuleSpec | None:
        """What the finders after this one find; those before it have found nothing."""
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            if (spec := finder.find_spec(self.name, path, target)) is not None:
                return spec
        return None
