//! One request, from its prompt to its last token.

use std::sync::mpsc::channel;

use minisgl_scheduler::fake::{FakeEngine, FakeOptions};
use minisgl_scheduler::message::{Command, FinishReason, NewRequest, Output, RequestId};
use minisgl_scheduler::sampling::SamplingParams;
use minisgl_scheduler::{Scheduler, SchedulerOptions};

#[test]
fn a_request_gets_its_tokens() {
    for overlap in [true, false] {
        let (commands, receiver) = channel();
        for id in 0..40 {
            let request = NewRequest {
                id: RequestId(id),
                prompt: (0..100 + id as u32 % 3).collect(),
                params: SamplingParams { max_tokens: 20, ..SamplingParams::default() },
                prompt_logprobs: None,
                constraint: None,
            };
            commands.send(Command::Submit(Box::new(request))).unwrap();
        }
        drop(commands);
        let (sender, outputs) = channel::<Output>();
        let sink =
            move |batch: Vec<Output>| batch.into_iter().for_each(|o| sender.send(o).unwrap());
        let options = SchedulerOptions { overlap, ..SchedulerOptions::default() };
        let engine = FakeEngine::new(FakeOptions::default());
        Scheduler::new(engine, options, receiver, sink).run().unwrap();
        let outputs: Vec<_> = outputs.iter().collect();
        assert_eq!(outputs.iter().filter(|o| o.token.is_some()).count(), 800);
        let finished = outputs.iter().filter(|o| o.finish == Some(FinishReason::Length)).count();
        assert_eq!(finished, 40);
    }
}
