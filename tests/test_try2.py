import json, os, time
from tests.test_distributed import *
def one(steps): return [[[m for rank in step for m in rank]] for step in steps]
def test_try(make_arguments, tmp_path_factory):
    folder=tmp_path_factory.mktemp("d")
    engines=os.environ.get("ENG","ddp,zero1,zero2,zero3,fsdp2").split(",")
    STEPS=ACCUMULATED+ACCUMULATED[:2]
    AT=3
    if os.environ.get("BIG"):
        from tests.conftest import tiny_config
        import transformers
        from transformers import AutoTokenizer, LlavaForConditionalGeneration, SiglipImageProcessorPil
        from interlace.model.loading import save_model, save_processing, Processing
        from interlace.data.template import ChatTemplate
        tok=AutoTokenizer.from_pretrained(ROOT/"data/demo/model"); cfg=tiny_config(tok); cfg.text_config.hidden_size=256; cfg.text_config.intermediate_size=1024
        print(len(tok)); m=LlavaForConditionalGeneration(cfg); d=folder/"big"; d.mkdir(); save_model(m,d)
        save_processing(Processing(tok, SiglipImageProcessorPil(size={"height":32,"width":32}), ChatTemplate(tok,cfg.image_token_id), cfg, 4), d)
        os.environ["EXTRA"]=json.dumps({"model_name_or_path":str(d)})
    def case(name,e,steps,world=2,**k):
        a=sgd_arguments(make_arguments,folder,**VARIANTS[os.environ.get("VAR","full")],**engine_arguments(e,folder),max_steps=len(steps),gradient_accumulation_steps=len(steps[0][0]),output_dir=str(folder/"out"))
        a|={"optim":"adamw_torch","learning_rate":1e-2,"weight_decay":0.1,"max_grad_norm":1.0}|json.loads(os.environ.get("EXTRA","{}"))
        return {"name":name,"arguments":a,"steps":steps,**k}
    cases=[]
    for e in engines:
        cases.append(case(e,e,STEPS,store=str(folder/f"state-{e}"),store_at=AT))
        cases.append(case(e+"-resumed",e,STEPS[AT:],restore=str(folder/f"state-{e}")))
        if os.environ.get("NOX"): continue
        if e!="zero3": cases.append(case(e+"-to-zero3","zero3",STEPS[AT:],restore=str(folder/f"state-{e}")))
        else: cases.append(case(e+"-to-zero1","zero1",STEPS[AT:],restore=str(folder/f"state-{e}")))
    t=time.time(); r=launch(cases,folder); print("took",time.time()-t)
    c1=[]
    for e in engines:
        e1="ddp" if e=="fsdp2" else e
        c1.append(case(e+"-to-one",e1,one(STEPS[AT:]),restore=str(folder/f"state-{e}")))
    if os.environ.get("ONE"):
        r1=launch(c1,folder,processes=1)
    for c in cases+(c1 if os.environ.get("ONE") else []):
        rr = r if c in cases else r1
        base=c["name"].split("-")[0]
        o=json.loads((rr/f"{c['name']}.json").read_text()); b=json.loads((r/f"{base}.json").read_text())
        w=load_file(rr/f"{c['name']}.safetensors"); wb=load_file(r/f"{base}.safetensors")
        n=len(o["losses"])
        print(c["name"],o["engine"],o["stage"],n,"loss", max(abs(x-y) for x,y in zip(o["losses"],b["losses"][-n:])),"w",max(float((w[k]-wb[k]).abs().max()) for k in w), o["losses"][:3])
